"""fuse_norms: a norm that one linear alone reads is computed as that linear reads its input, in fp32."""

from __future__ import annotations

import torch
from torch import fx

from qpass.passes.attributes import attach
from qpass.passes.context import Context
from qpass.passes.norms import NORM
from qpass.passes.values import Writes, only_user

QUANTIZED = torch.ops.qpass.quantized_linear.default
FUSED_NAMES = {"rms": "rms_norm", "layer": "layer_norm"}
"""What explain calls them."""


def fuse_norms(graph: fx.Graph, ctx: Context) -> int:
    """Move each ``qpass.norm`` whose only reader is a ``quantized_linear`` into it; returns how many.

    The linear then reads what the norm read: in a transformer, the residual stream. Weights become fp32 constants [K],
    with Gemma's 1 added. Merged siblings are one reader; a norm with several stays, so that it is computed once.
    """
    writes = Writes(graph)
    return sum(_fuse(graph, node, ctx, writes) for node in list(graph.find_nodes(op="call_function", target=NORM)))


def _fuse(graph: fx.Graph, node: fx.Node, ctx: Context, writes: Writes) -> bool:
    site = only_user(node)
    if site is None or site.target is not QUANTIZED or site.args[0] is not node:
        return False
    x, norm, weight, bias, eps, *offset = node.args
    if writes.touch(node, x):
        return False
    keywords = dict(site.kwargs) | {"norm": norm, "norm_eps": eps}
    with graph.inserting_before(site):
        for name, vector, added in (("norm_weight", weight, sum(offset)), ("norm_bias", bias, 0)):
            if vector is not None:
                tensor = ctx.vector(vector).float() + added
                keywords[name] = attach(graph, f"qpass_{name}", tensor.contiguous())
    site.args, site.kwargs = (x, *site.args[1:]), keywords
    site.meta["qpass_fused"] = (FUSED_NAMES[str(norm)], *site.meta.get("qpass_fused", ()))
    graph.erase_node(node)
    return True
