"""Which rows of the linear before it a value's channels come from, through what commutes with a positive factor a channel."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from qpass.passes.activations import activation_of
from qpass.passes.linears import LINEAR
from qpass.passes.values import Writes, argument, only_user, same_kind, tensor_of


@dataclass(frozen=True)
class Rows:
    """``count`` rows of a canonical linear, from ``start`` on."""

    linear: fx.Node
    start: int
    count: int


def rows_before(x: fx.Node, writes: Writes) -> Rows | None:
    """The rows that ``x [..., K]`` is proportional to, channel by channel, and that reach nothing else: scaled by f > 0,
    they scale x by f.

    Through ``anything * y`` (a gate's product), through ``relu(y)``, or directly; y is a linear's output or a part of it.
    """
    if x.op == "call_function" and x.target is operator.mul and len(x.args) == 2:
        for y, other in (x.args[::-1], x.args):
            if y is not other and isinstance(y, fx.Node) and same_kind(y, x) and only_user(y) is x:
                found = _rows_of(y, writes)
                if found is not None:
                    return None if writes.touch(x) else found
        return None
    if activation_of(x) == "relu":
        (y,) = x.all_input_nodes
        return _rows_of(y, writes) if only_user(y) is x and not writes.touch(x) else None
    return _rows_of(x, writes)


def _rows_of(y: fx.Node, writes: Writes) -> Rows | None:
    """The rows of a linear that ``y`` is, if nobody else reads these."""
    if writes.touch(y) or y.op != "call_function":
        return None
    if y.target is LINEAR:
        value = tensor_of(y)
        return None if value is None else Rows(y, 0, value.shape[-1])
    if y.target is not operator.getitem or not isinstance(y.args[0], fx.Node) or not isinstance(y.args[1], int):
        return None
    pieces, index = y.args[0], y.args[1]
    linear = pieces.args[0] if pieces.target in (torch.split, "split", torch.chunk, "chunk") else None
    values, value = pieces.meta.get("example_value"), tensor_of(linear)
    if not isinstance(linear, fx.Node) or linear.target is not LINEAR or value is None or only_user(linear) is None:
        return None
    if argument(pieces, 2, "dim", 0) not in (-1, value.dim() - 1) or not isinstance(values, tuple | list):
        return None
    if index < 0 or any(u.target is not operator.getitem or (u is not y and u.args[1] == index) for u in pieces.users):
        return None
    widths = [part.shape[-1] for part in values]
    return Rows(linear, sum(widths[:index]), widths[index])
