"""What the fake tensors of a Dynamo graph tell about a node: shape, dtype, who shares its memory, who writes to it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

VALUE = "example_value"
"""The key under which Dynamo keeps a node's fake tensor."""

_IN_PLACE_NAMES = (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "imatmul",
    "setitem",
)
_IN_PLACE_OPERATORS = frozenset(getattr(operator, name) for name in _IN_PLACE_NAMES)
_IN_PLACE_METHODS = frozenset(f"__{name}__" for name in _IN_PLACE_NAMES)


def value_of(node: object) -> Any:
    """The node's fake value (a tensor, a tuple of them, a number); None where there is none."""
    return node.meta.get(VALUE) if isinstance(node, fx.Node) else None


def tensor_of(node: object) -> Tensor | None:
    """The node's fake tensor. None also inside a vmap or grad, where it does not show its real shape."""
    value = value_of(node)
    return value if isinstance(value, Tensor) and not is_functorch_wrapped_tensor(value) else None


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Equal for certain; never adds a guard on a symbolic size."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def same_kind(a: object, b: object) -> bool:
    """Both nodes hold tensors of one shape and dtype, so that a pointwise op between them broadcasts and casts nothing."""
    x, y = tensor_of(a), tensor_of(b)
    return x is not None and y is not None and x.dtype == y.dtype and same_sizes(x.shape, y.shape)


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user, if it reads the node exactly once."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.all_input_nodes.count(node) == 1 and _reads(user, node) == 1 else None


def _reads(user: fx.Node, node: fx.Node) -> int:
    count = 0

    def visit(arg: fx.Node) -> fx.Node:
        nonlocal count
        count += arg is node
        return arg

    fx.map_arg((user.args, user.kwargs), visit)
    return count


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument that may come by position or by name."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def set_value(node: fx.Node) -> None:
    """Run the node on its operands' fake values, and keep the result as its own."""
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda arg: value_of(arg) if isinstance(arg, fx.Node) else arg
    )
    with torch.no_grad():
        if node.op == "call_method":
            node.meta[VALUE] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            node.meta[VALUE] = node.target(*args, **kwargs)  # type: ignore[operator]


def respell(node: fx.Node, target: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
    """Turn the node into a call of ``target`` with the same value; name and meta stay."""
    node.op, node.target, node.args, node.kwargs = "call_function", target, args, kwargs or {}


def erase_if_unused(*nodes: object) -> None:
    """Erase those that have no users, later ones first. For nodes that the caller knows to be pure."""
    for node in sorted({n for n in nodes if isinstance(n, fx.Node)}, reverse=True):
        if not node.users and node.op not in ("placeholder", "output"):
            node.graph.erase_node(node)


def storages(node: object) -> Iterator[Hashable]:
    """Names of the memory behind the node's tensors. Fake views share it with their base, as the real ones will."""
    value = value_of(node)
    for item in value if isinstance(value, tuple | list) else (value,):
        if isinstance(item, Tensor) and item.layout is torch.strided:
            while is_functorch_wrapped_tensor(item):
                item = get_unwrapped(item)
            yield item.untyped_storage()._cdata


class Writes:
    """The memory that some node of the graph writes to, at any place: such a value is never matched."""

    def __init__(self, graph: fx.Graph) -> None:
        self._written = {s for node in graph.nodes for operand in written_operands(node) for s in storages(operand)}

    def touch(self, *nodes: object) -> bool:
        """Whether any of the nodes, or a view or a base of it, is written to."""
        return any(s in self._written for node in nodes for s in storages(node))


def written_operands(node: fx.Node) -> list[fx.Node]:
    """The operands whose memory the node writes to."""
    operands: list[object] = [node.kwargs.get("out")]
    first = node.args[0] if node.args else node.kwargs.get("input")
    if node.op == "call_method":
        if _ends_in_place(str(node.target)):
            operands.append(first)
    elif node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            given = dict(zip((a.name for a in target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)
            operands += [
                given.get(a.name)
                for a in target._schema.arguments
                if a.alias_info is not None and a.alias_info.is_write
            ]
        elif target in _IN_PLACE_OPERATORS or _ends_in_place(getattr(target, "__name__", "")):
            operands.append(first)
        elif target is torch.nn.functional.embedding and argument(node, 3, "max_norm") is not None:
            operands.append(node.args[1])
        elif writes_in_place(node):
            operands.append(first)
    return [arg for arg in _flat(operands) if isinstance(value_of(arg), Tensor)]


def writes_in_place(node: fx.Node) -> bool:
    """A function such as ``silu(x, inplace=True)``."""
    index = _inplace_position(node.target) if callable(node.target) else None
    return index is not None and bool(argument(node, index, "inplace", False))


@cache
def _inplace_position(target: Any) -> int | None:
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None  # a builtin: torch's own take no such argument
    return names.index("inplace") if "inplace" in names else None


def _ends_in_place(name: str) -> bool:
    """``add_`` and ``__iadd__``, but not ``__add__``."""
    return name in _IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__"))


def _flat(items: Iterable[object]) -> Iterator[fx.Node]:
    for item in items:
        if isinstance(item, fx.Node):
            yield item
        elif isinstance(item, tuple | list):
            yield from _flat(item)
