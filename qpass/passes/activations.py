"""Activations: one spelling for each, whatever the model wrote.

A formula written out by hand (transformers has four of the tanh gelu alone) is recognized by its values: the pure
pointwise nodes between one tensor and the result are run in fp64 on a grid and compared with the functions that the
vocabulary names. The formulas are analytic, so agreement on the grid is agreement everywhere.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qpass.ops.epilogue import ACTIVATIONS
from qpass.passes.values import (
    Writes,
    argument,
    erase_if_unused,
    respell,
    same_kind,
    tensor_of,
    writes_in_place,
)

SPELLINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "relu": (F.relu, {}),
    "gelu": (F.gelu, {}),
    "gelu_tanh": (F.gelu, {"approximate": "tanh"}),
    "silu": (F.silu, {}),
}
"""The canonical call of each activation: the function and its keywords; the operand is the only positional."""

_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", "relu": "relu", F.silu: "silu", F.gelu: "gelu"}
_IN_PLACE = {"relu_": "relu", torch.relu_: "relu", F.relu_: "relu", torch.ops.aten.silu_.default: "silu"}

_MARKS = frozenset(
    {torch.tanh, torch.erf, torch.sigmoid, torch.exp, F.tanh, F.sigmoid, "tanh", "erf", "sigmoid", "exp"}
)
_POINTWISE = _MARKS | {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.pow, torch.square),
    *("add", "sub", "mul", "div", "neg", "pow", "square"),
}
_LARGEST = 12  # nodes; the longest known spelling has eight
_GRID = torch.cat((torch.linspace(-12, 12, 193, dtype=torch.float64), torch.tensor([-80.0, 80.0], dtype=torch.float64)))
# Constants such as 0.79788456 are written with eight digits (error below 1e-8 here); erf and tanh gelu differ by 4.7e-4.
_TOLERANCE = 1e-6


def activation_of(node: object) -> str | None:
    """The vocabulary's name of a canonical activation node."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or len(node.args) != 1:
        return None
    for name, (function, keywords) in SPELLINGS.items():
        if node.target is function and dict(node.kwargs) == keywords:
            return name
    return None


def spell_call(node: fx.Node) -> bool:
    """Respell a call such as ``x.relu()`` or ``silu(x, inplace=False)``. In-place calls are for spellings.functionalize."""
    if not spells_activation(node) or activation_of(node) is not None:
        return False
    name = _FUNCTIONS[node.target]
    if name == "gelu" and argument(node, 1, "approximate", "none") == "tanh":
        name = "gelu_tanh"
    function, keywords = SPELLINGS[name]
    respell(node, function, (argument(node, 0, "input"),), keywords)
    return True


def spells_activation(node: fx.Node) -> bool:
    """Whether the node is one call of an activation, in whatever spelling; in-place calls aside."""
    if node.op not in ("call_function", "call_method") or node.target not in _FUNCTIONS or writes_in_place(node):
        return False
    return tensor_of(argument(node, 0, "input")) is not None


def in_place_activation(node: fx.Node) -> str | None:
    """The activation that an in-place call applies: ``x.relu_()``, ``silu(x, inplace=True)``."""
    if node.op not in ("call_function", "call_method"):
        return None
    return _FUNCTIONS.get(node.target) if writes_in_place(node) else _IN_PLACE.get(node.target)


def spell_formula(node: fx.Node, writes: Writes) -> bool:
    """Replace a formula that ends in ``node`` and computes a known activation by that activation's call."""
    if not _is_pointwise(node) or tensor_of(node) is None:
        return False
    inside: set[fx.Node] = {node}
    frontier = {operand for operand in node.all_input_nodes if tensor_of(operand) is not None}
    while frontier:
        if len(frontier) == 1 and any(n.target in _MARKS for n in inside):
            (x,) = frontier
            name = _recognize(node, inside, x)
            if name is not None:
                if writes.touch(x, *inside):
                    return False
                function, keywords = SPELLINGS[name]
                respell(node, function, (x,), keywords)
                erase_if_unused(*(inside - {node}))
                return True
        last = max(frontier)  # the latest first, so that a single node left is all that the formula reads
        if (
            not _is_pointwise(last)
            or len(inside) == _LARGEST
            or not same_kind(last, node)
            or not set(last.users) <= inside
        ):
            return False
        frontier.remove(last)
        inside.add(last)
        frontier |= {operand for operand in last.all_input_nodes if tensor_of(operand) is not None}
    return False


def _is_pointwise(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or node.target not in _POINTWISE or node.kwargs:
        return False
    return all(tensor_of(operand) is not None for operand in node.all_input_nodes)


def _recognize(root: fx.Node, inside: set[fx.Node], x: fx.Node) -> str | None:
    if not same_kind(x, root):
        return None
    values: dict[fx.Node, Tensor] = {x: _GRID}
    for node in sorted(inside):
        args = fx.map_arg(node.args, lambda arg: values[arg])
        if node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:])
        else:
            values[node] = node.target(*args)  # type: ignore[operator]
    for name in SPELLINGS:
        if torch.allclose(values[root], ACTIVATIONS[name](_GRID), rtol=0, atol=_TOLERANCE):
            return name
    return None
