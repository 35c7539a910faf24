"""keep_int8: what only linears with one static scale read is rounded once, to their int8 codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qpass.passes.context import Context
from qpass.passes.values import VALUE, Writes, tensor_of

QUANTIZED = torch.ops.qpass.quantized_linear.default


def keep_int8(graph: fx.Graph, ctx: Context) -> int:
    """Let each ``quantized_linear`` whose readers agree on a static scale write int8; returns how many do.

    In a transformer: the gated pair or first linear of a feed-forward block, for the one behind it.
    """
    writes = Writes(graph)
    count = 0
    for node in graph.find_nodes(op="call_function", target=QUANTIZED):
        scale, value = scale_wanted(node), tensor_of(node)
        if scale is None or value is None or writes.touch(node):
            continue
        for reader in list(node.users):
            reader.kwargs = dict(reader.kwargs) | {"dtype": value.dtype}
        rotate = any(reader.kwargs.get("rotate") for reader in node.users)
        node.kwargs = dict(node.kwargs) | {"y_scale": scale} | ({"y_rotate": True} if rotate else {})
        node.meta[VALUE] = value.to(torch.int8)
        node.meta["qpass_fused"] = (*node.meta.get("qpass_fused", ()), "int8")
        count += 1
    return count


def scale_wanted(node: fx.Node) -> float | None:
    """The one static scale by which all readers of a quantized_linear quantize its output; None where they don't.

    Nor where some want it rotated and others don't.
    """
    scales: set[Any] = set()
    for reader in node.users:
        operands = (*reader.args, *reader.kwargs.values())
        if reader.target is not QUANTIZED or reader.args[0] is not node or sum(o is node for o in operands) != 1:
            return None
        if reader.kwargs.get("norm", "none") != "none" or "outliers" in reader.kwargs:
            return None
        scales.add((reader.kwargs.get("x_scale"), bool(reader.kwargs.get("rotate"))))
    return scales.pop()[0] if len(scales) == 1 else None
