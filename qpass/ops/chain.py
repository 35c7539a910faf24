"""``qpass::chain``: calls of native ops, one behind the other, as one op. Natively ``kernels/cpp/binding_chain.h``.

A decode step of thirty layers is some two hundred calls of a few microseconds, and Python's part of each, its code and
objects driven out of the caches by the weights between two of them, costs as much again. A program is text:

    inputs 7
    attention %0 %1 %2 %3 0.125 0.0 - -
    flatten %7
    packed_linear %8 %4 - - %5 576 576 22 0 0 0 - - 0.0 - - - - - 0 0
    return %9

Slots are the given tensors, then one a line. Arguments stand in the order of the op's schema, ``-`` for None.
A program that writes to caches is ``chain.one`` or ``chain.two``, by its results; the caches' slots follow the tensors'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import qpass.ops.attention
import qpass.ops.packed_linear
import qpass.ops.rope_append  # noqa: F401  all define their ops
from qpass.ops.linear import LIBRARY

LIBRARY.define("chain(Tensor[] tensors, str program) -> Tensor[]")
LIBRARY.define("chain.one(Tensor[] tensors, Tensor(a!)[] caches, str program) -> Tensor")
LIBRARY.define("chain.two(Tensor[] tensors, Tensor(a!)[] caches, str program) -> (Tensor, Tensor)")

OPS: dict[str, Any] = {
    "packed_linear": torch.ops.qpass.packed_linear.default,
    "attention": torch.ops.qpass.attention.default,
    "rope_append": torch.ops.qpass.rope_append.default,
}
FLATTEN = "flatten"  # the last two dimensions into one: a head's outputs side by side
SLOTS = "slots"  # a cache [L, B, H, D] as attention reads it, [B, H, L, D]
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    FLATTEN: lambda x: x.flatten(-2),
    SLOTS: lambda x: x.permute(1, 2, 0, 3),
}


def line(name: str, arguments: Sequence[Any]) -> str:
    """One step: tensors given as their slots wrapped in :class:`Slot`."""
    return " ".join((name, *map(_word, arguments)))


class Slot(int):
    """A tensor's place among a program's tensors."""


def _word(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Slot):
        return f"%{int(value)}"
    return str(int(value)) if isinstance(value, bool | int) else repr(float(value))


def _chain(tensors: Sequence[Tensor], program: str) -> list[Tensor]:
    """What the program says, each call through its own op. Outputs are those that ``return`` names."""
    slots = list(tensors)
    first, *steps, last = program.split("\n")
    if first != f"inputs {len(slots)}" or not last.startswith("return "):
        raise ValueError(f"chain: {len(slots)} tensors were given to a program that begins with {first!r}")
    for step in steps:
        name, *words = step.split(" ")
        if name in VIEWS:
            slots.append(VIEWS[name](slots[int(words[0][1:])]))
            continue
        op = OPS[name]
        arguments = zip(op._schema.arguments, words, strict=True)
        slots.append(op(*(_value(str(argument.type), word, slots) for argument, word in arguments)))
    return [slots[int(word[1:])] for word in last.split(" ")[1:]]


def _one(tensors: Sequence[Tensor], caches: Sequence[Tensor], program: str) -> Tensor:
    (result,) = _chain([*tensors, *caches], program)
    return result


def _two(tensors: Sequence[Tensor], caches: Sequence[Tensor], program: str) -> tuple[Tensor, Tensor]:
    first, second = _chain([*tensors, *caches], program)
    return first, second


def _value(kind: str, word: str, slots: list[Tensor]) -> Any:
    if word == "-":
        return None
    if word.startswith("%"):
        return slots[int(word[1:])]
    return float(word) if "float" in kind else bool(int(word)) if kind == "bool" else int(word)


for _name, _meaning in (("chain", _chain), ("chain.one", _one), ("chain.two", _two)):
    LIBRARY.impl(_name, _meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qpass::{_name}", _meaning, lib=LIBRARY)
