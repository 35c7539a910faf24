"""One spelling for additions and products, no in-place call where none is needed, no node that does nothing."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qpass.passes.activations import SPELLINGS, in_place_activation
from qpass.passes.values import argument, respell, same_kind, same_sizes, set_value, storages, tensor_of

_ARITHMETIC: dict[Any, Any] = {
    torch.add: operator.add,
    "add": operator.add,
    torch.mul: operator.mul,
    torch.multiply: operator.mul,
    "mul": operator.mul,
    "multiply": operator.mul,
}
_IN_PLACE_ARITHMETIC: dict[Any, Any] = {
    operator.iadd: operator.add,
    "add_": operator.add,
    operator.imul: operator.mul,
    "mul_": operator.mul,
}
_CASTS = frozenset({"to", "type", "type_as", "float", "bfloat16", "half"})
_RESHAPES = frozenset({"view", "reshape", torch.reshape})
_DROPOUTS = frozenset({F.dropout, torch.dropout})


def spell_arithmetic(node: fx.Node) -> bool:
    """``torch.add(a, b)``, ``a.add(b)`` -> ``operator.add(a, b)``; likewise mul."""
    if not spells_arithmetic(node):
        return False
    respell(node, _ARITHMETIC[node.target], _two_operands(node) or ())
    return True


def spells_arithmetic(node: fx.Node) -> bool:
    """Whether the node is a plain addition or product in another spelling than ``operator``'s."""
    if node.op not in ("call_function", "call_method") or node.target not in _ARITHMETIC:
        return False
    return _two_operands(node) is not None and tensor_of(node) is not None


class Owners:
    """Which node first held each piece of memory."""

    def __init__(self, graph: fx.Graph) -> None:
        self._first: dict[Hashable, fx.Node] = {}
        for node in graph.nodes:
            for storage in storages(node):
                self._first.setdefault(storage, node)

    def is_fresh(self, node: fx.Node) -> bool:
        """Computed by this very node: neither an input nor a view of something earlier."""
        return node.op.startswith("call") and all(self._first[storage] is node for storage in storages(node))


def functionalize(node: fx.Node, owners: Owners) -> bool:
    """``a += b`` -> ``a + b`` (and mul, relu, silu), where nobody else can see that ``a`` changed.

    That is so when ``a`` was computed by the node before, has no view and no user but this one, and the result has its
    shape and dtype.
    """
    if node.op not in ("call_function", "call_method"):
        return False
    activation = in_place_activation(node)
    function = _IN_PLACE_ARITHMETIC.get(node.target)
    if activation is not None:
        operands: tuple[Any, ...] | None = (argument(node, 0, "input"),)
        function, keywords = SPELLINGS[activation]
    elif function is not None:
        operands, keywords = _two_operands(node), {}
    else:
        return False
    if operands is None:
        return False
    target, others = operands[0], operands[1:]
    if (
        not isinstance(target, fx.Node)
        or len(target.users) != 1
        or not owners.is_fresh(target)
        or not same_kind(target, node)
    ):
        return False
    value = tensor_of(target)
    assert value is not None
    for other in others:
        operand = tensor_of(other)
        if other is target or (operand is None and not isinstance(other, int | float)):
            return False
        if operand is not None and (operand.dtype != value.dtype or operand.dim() > value.dim()):
            return False  # the out-of-place call would give another dtype or shape
    if not value.is_floating_point():
        return False
    respell(node, function, operands, keywords)
    return True


def drop_noops(graph: fx.Graph) -> int:
    """Let the users of each node that changes nothing read its operand; returns how many went."""
    count, stale = 0, set()
    for node in list(graph.nodes):
        x = argument(node, 0, "input") if node.op in ("call_function", "call_method") else None
        if isinstance(x, fx.Node) and _is_noop(node, x):
            stale |= set(storages(node)) - set(storages(x))  # a dropout's fake is a copy, the real one is x itself
            node.replace_all_uses_with(x)
            graph.erase_node(node)
            count += 1
    if stale:
        for node in graph.nodes:
            if not stale.isdisjoint(storages(node)):
                set_value(node)
    return count


def _is_noop(node: fx.Node, x: fx.Node) -> bool:
    if node.target in _DROPOUTS:
        training = argument(node, 2, "train" if node.target is torch.dropout else "training", True)
        probability = argument(node, 1, "p", 0.5)
        return not training or (isinstance(probability, int | float) and probability == 0)
    before, after = tensor_of(x), tensor_of(node)
    if _slices(node) and before is not None and after is not None:
        return same_sizes(before.shape, after.shape)
    if (node.op != "call_method" and node.target not in _RESHAPES) or before is None or after is None:
        return False
    if node.target == "contiguous":
        return not node.kwargs and len(node.args) == 1 and before.is_contiguous()
    if node.target in _CASTS:
        plain = (
            not node.kwargs.get("copy")
            and "memory_format" not in node.kwargs
            and not any(a is True for a in node.args[2:])
        )
        return plain and before.dtype == after.dtype and before.device == after.device
    if node.target in _RESHAPES:
        return before.dtype == after.dtype and same_sizes(before.shape, after.shape)
    return False


def _slices(node: fx.Node) -> bool:
    """``x[:, 0:, :]``: nothing but slices in steps of one, so that what keeps its sizes is what it was."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return False
    key = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(part is Ellipsis or (isinstance(part, slice) and part.step in (None, 1)) for part in key)


def _two_operands(node: fx.Node) -> tuple[Any, Any] | None:
    """The operands of an addition or product without further options."""
    extra = set(node.kwargs) - {"input", "other", "alpha"}
    if extra or len(node.args) > 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    a, b = argument(node, 0, "input"), argument(node, 1, "other")
    return None if a is None or b is None or isinstance(a, Tensor) else (a, b)
