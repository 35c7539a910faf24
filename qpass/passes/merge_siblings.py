"""merge_siblings: linears that read one input become one, so that it is read, quantized and multiplied once."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from qpass.passes.activations import activation_of
from qpass.passes.context import Context
from qpass.passes.linears import LINEAR
from qpass.passes.values import VALUE, Writes, only_user, same_kind, set_value, storages


def merge_siblings(graph: fx.Graph, ctx: Context) -> int:
    """Merge ``qpass.linear`` nodes of one input and one quantizing scheme; returns how many merged ones there are.

    Given codes merge with given codes that want their input divided and ordered alike.
    A gated pair (``act(gate) * up``) is merged by itself, gate first, for fuse_epilogues to take the gate in. A linear
    under an activation of its own stays single: its epilogue is worth more than the shared read.
    """
    writes = Writes(graph)
    families: dict[tuple, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        x, weights, _ = node.args
        scheme, ref = ctx.scheme_for(node), ctx.weight_ref(weights[0])
        if not scheme.quantizes or ref is None or writes.touch(x, node):
            continue
        given = ctx.given_of(node)
        wants = given.input_key if given is not None else None
        families.setdefault((x, scheme, ref.parameter.dtype, wants), []).append(node)
    groups = [group for family in families.values() for group in _groups(sorted(family)) if len(group) > 1]
    bound_by_strides = _storages_bound_by_strides(graph)
    count, parted = 0, set()
    for group in groups:
        held = {s for node in group for s in storages(node)}
        if held.isdisjoint(bound_by_strides):
            _merge(graph, group)
            parted |= held
            count += 1
    for node in graph.nodes:  # a part of a wider row is not contiguous: where a view may fail, a reshape does the same
        if node.op == "call_method" and node.target in _VIEWS and not parted.isdisjoint(storages(node)):
            node.target = _VIEWS[node.target]
    return count


def _groups(family: list[fx.Node]) -> Iterator[list[fx.Node]]:
    rest = list(family)
    for gate in family:
        up = _gated_by(gate, rest)
        if up is not None:
            rest = [node for node in rest if node is not gate and node is not up]
            yield [gate, up]
    yield [node for node in rest if activation_of(only_user(node)) is None]


def _gated_by(gate: fx.Node, siblings: list[fx.Node]) -> fx.Node | None:
    """The sibling ``up`` of ``act(gate) * up``, where nobody else reads any of it."""
    activation = only_user(gate)
    if gate not in siblings or activation is None or activation_of(activation) is None:
        return None
    product = only_user(activation)
    if product is None or product.op != "call_function" or product.target is not operator.mul:
        return None
    for up in siblings:
        if up is not gate and up in product.args and only_user(up) is product and same_kind(gate, up):
            return up
    return None


def _merge(graph: fx.Graph, group: list[fx.Node]) -> None:
    first = min(group)
    weights = [node.args[1][0] for node in group]  # type: ignore[index]
    biases = [node.args[2][0] for node in group]  # type: ignore[index]
    for operand in (*weights, *biases):
        if isinstance(operand, fx.Node) and operand.op != "placeholder" and operand > first:
            first.prepend(operand)  # a transpose that was placed before its own linear
    rows = [node.meta[VALUE].shape[-1] for node in group]
    with graph.inserting_before(first):
        merged = graph.call_function(LINEAR, (first.args[0], weights, biases))
        merged.meta = dict(first.meta) | {
            "qpass_names": tuple(name for node in group for name in node.meta["qpass_names"])
        }
        set_value(merged)
        parts = graph.call_function(torch.split, (merged, rows, -1))
        set_value(parts)
        pieces = [graph.call_function(operator.getitem, (parts, index)) for index in range(len(group))]
    for node, piece in zip(group, pieces, strict=True):
        piece.meta = {key: value for key, value in node.meta.items() if key != "qpass_names"}
        node.replace_all_uses_with(piece)
        graph.erase_node(node)


_VIEWS = {"view": "reshape", "view_as": "reshape_as"}


def _storages_bound_by_strides(graph: fx.Graph) -> set:
    """The memory that some node reads by its strides, or as another dtype: it must stay laid out as it is."""
    bound = set()
    for node in graph.nodes:
        by_strides = node.target in ("as_strided", torch.as_strided)
        as_dtype = node.target == "view" and any(
            isinstance(arg, torch.dtype) for arg in (*node.args, *node.kwargs.values())
        )
        if by_strides or as_dtype:
            bound |= set(storages(node))
    return bound
