"""share_embeddings: an embedding whose table is also the head's matrix reads the head's packed copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qpass.lowering import ANY
from qpass.lowering.given import given_of
from qpass.passes.context import Context, SiteRecord
from qpass.passes.names import Names
from qpass.passes.values import VALUE, argument, tensor_of

EMBEDDING = torch.nn.functional.embedding
PACKED_LINEAR = torch.ops.qpass.packed_linear.default
PACKED_EMBEDDING = torch.ops.qpass.packed_embedding.default
BITS = 8  # fewer would cost quality that the head's scheme was not chosen for


def share_embeddings(graph: fx.Graph, ctx: Context) -> int:
    """Turn ``F.embedding`` over a tied table into rows of the packed weight; returns how many.

    The head must be in this graph, of eight bits, and lowered to kernels that can gather rows. The full-precision table
    is then read by nobody. An embedding that is tied to no linear, or only in another graph, stays as it is.
    """
    heads = {
        id(ref.parameter): node
        for node in graph.find_nodes(op="call_function", target=PACKED_LINEAR)
        if (ref := _whole_weight(node)) is not None
    }
    names = Names(graph, ctx.parameters)
    embeddings = list(graph.find_nodes(op="call_function", target=EMBEDDING)) if heads else []
    return sum(_share(graph, node, heads, ctx, names) for node in embeddings)


def _whole_weight(head: fx.Node) -> Any:
    """The one Parameter [N, K], as it is, that a packed linear multiplies by; None for merged or transposed ones."""
    refs = head.meta["qpass_refs"]
    return refs[0] if len(refs) == 1 and not refs[0].transposed and not _glu(head) else None


def _glu(head: fx.Node) -> bool:
    return bool(head.args[9])


def _share(graph: fx.Graph, node: fx.Node, heads: dict[int, fx.Node], ctx: Context, names: Names) -> bool:
    ids, table = argument(node, 0, "input"), argument(node, 1, "weight")
    parameter = ctx.parameters.get(table.name) if isinstance(table, fx.Node) else None
    head = heads.get(id(parameter))
    if parameter is None or head is None or tensor_of(ids) is None or tensor_of(node) is None:
        return False
    given = given_of(parameter)
    if given is not None and (given.divisor is not None or given.order is not None):
        return False  # rows of the packed table are not the embedding's then
    if argument(node, 3, "max_norm") is not None or argument(node, 6, "sparse", False):
        return False
    if head.meta["qpass_refs"][0].scaling is not None:
        return False
    scheme = head.meta["qpass_scheme"]
    if scheme.weight.bits != BITS or tensor_of(node).dtype != parameter.dtype:
        return False
    packed, (n, k, format) = head.args[1], head.args[5:8]
    with graph.inserting_before(node):
        rows = graph.get_attr(packed.target)
        rows.meta = dict(packed.meta)
        new = graph.call_function(PACKED_EMBEDDING, (ids, rows, n, k, format, parameter.dtype))
    new.meta = dict(node.meta) | {VALUE: node.meta[VALUE]}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    name = names.module(new) or names.parameter(table).removesuffix(".weight")
    ctx.records.append(
        SiteRecord(
            names=(name,),
            name=name,
            n=n,
            k=k,
            scheme=scheme.name,
            lowering="generated",
            same_rows=ANY,  # a row is copied, whatever else is
            notes=(f"shares the table of {head.meta['qpass_names'][0]}",),
        )
    )
    return True
