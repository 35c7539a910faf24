"""fuse_rope: what stands between q|k|v and attention, rotation and the cache's writes, becomes one native call."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import permutations
from typing import Any

import torch
from torch import fx

from qpass.ops.rope_append import _rope_append, heads_of
from qpass.passes.context import Context
from qpass.passes.values import erase_if_unused, set_value, tensor_of, value_of

ATTENTION = (torch.ops.qpass.attention, torch.ops.qpass.attention.default)
ROPE = torch.ops.qpass.rope_append.default
TO_HEADS = (1, 2, 0, 3)  # how attention sees a cache [L, B, H, D]

_CASTS = frozenset({"to", "float", "type_as"})
_STEPS = frozenset(
    {
        *(operator.getitem, operator.add, operator.sub, operator.mul, operator.neg),
        *(torch.add, torch.sub, torch.mul, torch.neg, torch.cat, torch.stack, torch.split, torch.chunk),
        *(torch.transpose, torch.permute, torch.reshape, torch.unsqueeze, torch.flatten),
        *("add", "sub", "mul", "neg", "split", "chunk", "flatten", "unflatten", "contiguous"),
        *("transpose", "permute", "reshape", "view", "unsqueeze"),
    }
)
_LARGEST = 64  # nodes; rotary by halves has twenty


def fuse_rope(graph: fx.Graph, ctx: Context) -> int:
    """Give each ``qpass.attention`` over a static cache its queries from a ``qpass.rope_append``; returns how many.

    As with norms, the formula is recognized by its values: the nodes between a linear's output, two tables and what is
    rotated and stored are run on a sample, in fp64, and compared with what the op means.
    """
    return sum(_fuse(graph, node) for node in list(graph.nodes) if node.target in ATTENTION)


def _fuse(graph: fx.Graph, attention: fx.Node) -> bool:
    query, key, value = attention.args[:3]
    written = [_written(graph, view, attention) for view in (key, value)]
    if None in written or query.users.keys() != {attention}:
        return False
    (keys, key_write), (values, value_write) = written
    if keys is values or key_write.args[1] != value_write.args[1]:
        return False
    slots, rows = key_write.args[1]
    results = (query, key_write.args[2], value_write.args[2])
    found = _region(results)
    if found is None or not _are_rows(rows):
        return False
    inside, leaves = found
    for qkv in leaves:
        tables = [leaf for leaf in leaves if leaf is not qkv]
        if not _may_be_qkv(qkv, keys, values) or len(tables) not in (0, 2) or not _alike(qkv, keys, values, *tables):
            continue
        for cos, sin in permutations(tables) if tables else [(None, None)]:
            if _means_rope(inside, results, qkv, cos, sin, keys, values):
                break
        else:
            continue
        with graph.inserting_before(attention):
            rope = graph.call_function(ROPE, (qkv, cos, sin, slots, keys, values))
        set_value(rope)
        attention.args = (rope, *attention.args[1:])
        graph.erase_node(key_write)
        graph.erase_node(value_write)
        erase_if_unused(*inside)
        return True
    return False


def _written(graph: fx.Graph, view: object, attention: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The cache that attention reads, and the one write to it, which comes before."""
    if not isinstance(view, fx.Node) or view.target != "permute" or view.args[1:] != TO_HEADS:
        return None
    cache: fx.Node = view.args[0]
    writes = [node for node in cache.users if node.target is operator.setitem and node.args[0] is cache]
    if len(writes) != 1 or view.users.keys() != {attention} or cache.users.keys() != {view, *writes}:
        return None
    (write,) = writes
    index = write.args[1]
    if not isinstance(index, tuple) or len(index) != 2 or not write < view or write.users:
        return None
    return cache, write


def _are_rows(node: object) -> bool:
    """``arange(B)[:, None]``."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or node.args[1] != (slice(None), None):
        return False
    (source, _) = node.args
    return source.target is torch.arange and len(source.args) == 1 and "start" not in source.kwargs


def _region(results: Iterable[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]] | None:
    """The nodes that compute the results, and what they compute them from."""
    inside: set[fx.Node] = set()
    leaves: dict[fx.Node, None] = {}
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node in inside or node in leaves:
            continue
        if isinstance(value_of(node), torch.SymInt | int):
            continue  # a size
        if node.op in ("call_function", "call_method") and (node.target in _STEPS or node.target in _CASTS):
            inside.add(node)
            waiting += node.all_input_nodes[:1] if node.target in _CASTS else node.all_input_nodes
        else:
            leaves[node] = None
        if len(inside) > _LARGEST or len(leaves) > 3:
            return None
    return inside, list(leaves)


def _may_be_qkv(node: fx.Node, keys: fx.Node, values: fx.Node) -> bool:
    x, k, v = (tensor_of(n) for n in (node, keys, values))
    if x is None or k is None or v is None or x.dim() != 3 or k.dim() != 4 or v.dim() != 4:
        return False
    return isinstance(x.shape[2], int) and heads_of(x.shape[2], k, v) >= 1


def _alike(*nodes: fx.Node) -> bool:
    """All floats of one dtype; tables are [.., Q, R]."""
    values = [tensor_of(node) for node in nodes]
    return (
        all(t is not None and t.dtype == values[0].dtype and t.dim() >= 3 for t in values)
        and values[0].is_floating_point()
    )


def _means_rope(
    inside: set[fx.Node],
    results: tuple[fx.Node, ...],
    qkv: fx.Node,
    cos: fx.Node | None,
    sin: fx.Node | None,
    keys: fx.Node,
    values: fx.Node,
) -> bool:
    """Whether the nodes give what the op gives, on a sample of the sizes that the graph was made with."""
    generator = torch.Generator().manual_seed(0)
    known: dict[fx.Node, Any] = {
        leaf: torch.randn(_sizes(leaf), generator=generator, dtype=torch.float64)
        for leaf in (qkv, cos, sin)
        if leaf is not None
    }
    if cos is not None and (known[cos].dim() != 3 or known[cos].shape != known[sin].shape):
        return False
    if cos is not None and (known[cos].shape[2] % 2 or known[cos].shape[2] > _sizes(keys)[3]):
        return False
    batch, queries, _ = known[qkv].shape
    if batch * queries == 0:
        return False
    slots = torch.arange(queries).expand(batch, queries)
    caches = [torch.zeros(queries, *_sizes(cache)[1:], dtype=torch.float64) for cache in (keys, values)]
    turns = (None, None) if cos is None else (known[cos], known[sin])
    rotated = _rope_append(known[qkv], turns[0], turns[1], slots, caches[0], caches[1])
    wanted = [rotated, *(cache.transpose(0, 1) for cache in caches)]
    try:
        for node in sorted(inside):
            known[node] = _run(node, known)
    except (RuntimeError, IndexError, TypeError):  # not of these sizes
        return False
    return all(
        known[node].shape == expected.shape and torch.allclose(known[node], expected, rtol=1e-12, atol=1e-12)
        for node, expected in zip(results, wanted, strict=True)
    )


def _sizes(node: fx.Node) -> list[int]:
    return [_number(size) for size in tensor_of(node).shape]


def _number(size: Any) -> int:
    """A size; of one that varies, what it was when the graph was made."""
    return size if isinstance(size, int) else int(size.node.hint)


def _run(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The node on sample values; casts change nothing."""
    if node.target in _CASTS:
        return known[node.args[0]]

    def real(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        return known[argument] if argument in known else _number(value_of(argument))

    args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), real)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)
