"""fuse_epilogues: what follows a linear point by point is computed in its epilogue, in fp32, before the output is rounded."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qpass.passes.activations import activation_of
from qpass.passes.context import Context
from qpass.passes.values import VALUE, Writes, argument, only_user, same_kind, tensor_of

QUANTIZED = torch.ops.qpass.quantized_linear.default


def fuse_epilogues(graph: fx.Graph, ctx: Context) -> int:
    """Move activation, gate, product and residual, in this order, into ``quantized_linear``; returns how many took some.

    A part is taken only if nobody else reads what it replaces, nothing involved is written to, and shapes and dtypes
    are equal. The fused node stands where the last part stood, behind everything that it reads.
    """
    writes = Writes(graph)
    # Backwards: when two linears meet in one addition, the later takes it, and no value has to wait.
    sites = list(graph.find_nodes(op="call_function", target=QUANTIZED))
    return sum(_fuse(graph, site, writes) for site in reversed(sites))


def _fuse(graph: fx.Graph, site: fx.Node, writes: Writes) -> bool:
    if writes.touch(site, site.args[0]):
        return False
    parts: dict[str, Any] = {}
    fused: list[str] = []
    last, consumed = site, []

    gated = _gate(site)
    if gated is not None:
        activation, nodes = gated
        parts |= {"activation": activation, "glu": True}
        fused += [activation, "glu"]
        last, consumed = nodes[-1], nodes
    else:
        follower = only_user(site)
        activation = activation_of(follower)
        if follower is not None and activation is not None and same_kind(follower, site):
            parts["activation"] = activation
            fused.append(activation)
            last, consumed = follower, [follower]

    for part, target in (("mul", operator.mul), ("residual", operator.add)):
        follower = only_user(last)
        other = None if follower is None else _other_operand(follower, last, target)
        if follower is not None and other is not None and not writes.touch(follower, other):
            parts[part] = other
            fused.append(part)
            consumed.append(follower)
            last = follower

    if not parts or writes.touch(*consumed):
        return False
    with graph.inserting_before(last):
        new = graph.create_node(
            "call_function", QUANTIZED, site.args, dict(site.kwargs) | parts, name=f"{site.name}_fused"
        )
    new.meta = dict(site.meta) | {VALUE: last.meta[VALUE], "qpass_fused": (*site.meta.get("qpass_fused", ()), *fused)}
    last.replace_all_uses_with(new)
    for node in reversed([site, *consumed]):
        graph.erase_node(node)
    return True


def _other_operand(node: fx.Node, value: fx.Node, target: Any) -> fx.Node | None:
    """What ``node`` multiplies or adds to ``value``, if it is a tensor just like it."""
    if node.op != "call_function" or node.target is not target or len(node.args) != 2:
        return None
    a, b = node.args
    other = b if a is value else a
    if not isinstance(other, fx.Node) or other is value:
        return None
    return other if same_kind(other, value) and same_kind(node, value) else None


def _gate(site: fx.Node) -> tuple[str, list[fx.Node]] | None:
    """``act(first half) * second half`` of the site's output: the activation, and the nodes in graph order."""
    halves = _halves(site)
    if halves is None:
        return None
    gate, up, between = halves
    activation = only_user(gate)
    product = None if activation is None else only_user(activation)
    name = activation_of(activation)
    if name is None or activation is None or product is None or only_user(up) is not product:
        return None
    if _other_operand(product, activation, operator.mul) is not up:
        return None
    return name, sorted([*between, gate, up, activation, product])


def _halves(site: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """The two equal halves of the last dimension, where the site's output is read as these and nothing else."""
    users = list(site.users)
    if len(users) == 1 and _splits_in_two(users[0]):
        pieces, between = list(users[0].users), users
        index = {node.args[1]: node for node in pieces if node.target is operator.getitem}
        first, second = index.get(0), index.get(1)
    elif len(users) == 2:
        pieces, between = users, []
        width = site.meta[VALUE].shape[-1]
        first, second = (next((n for n in users if _slice_of(n, width) == half), None) for half in (0, 1))
    else:
        return None
    if first is None or second is None or len(pieces) != 2 or not same_kind(first, second):
        return None
    return first, second, between


def _splits_in_two(node: fx.Node) -> bool:
    """``split(y, [n, n], -1)``, ``split(y, n, -1)`` or ``chunk(y, 2, -1)``, over the last dimension."""
    if node.target not in (torch.split, "split", torch.chunk, "chunk"):
        return False
    source = tensor_of(node.args[0])
    values = node.meta.get(VALUE)
    dim = argument(node, 2, "dim", 0)
    return (
        source is not None and dim in (-1, source.dim() - 1) and isinstance(values, tuple | list) and len(values) == 2
    )


def _slice_of(node: fx.Node, width: Any) -> int | None:
    """0 for ``y[..., :n]``, 1 for ``y[..., n:]``, with n half of the width."""
    if node.target is not operator.getitem or not isinstance(width, int) or width % 2:
        return None
    key = node.args[1]
    if not (isinstance(key, tuple) and len(key) == 2 and key[0] is Ellipsis and isinstance(key[1], slice)):
        return None
    half, part = width // 2, key[1]
    if part.step not in (None, 1):
        return None
    if part.start in (None, 0) and part.stop == half:
        return 0
    return 1 if part.start == half and part.stop in (None, width) else None
