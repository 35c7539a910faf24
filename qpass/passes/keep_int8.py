"""keep_int8: what only linears with one static quantizer read is rounded once, to their int8 codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qpass.passes.context import Context
from qpass.passes.values import VALUE, Writes, tensor_of

QUANTIZED = torch.ops.qpass.quantized_linear.default


def keep_int8(graph: fx.Graph, ctx: Context) -> int:
    """Let each ``quantized_linear`` whose readers agree on a static quantizer write int8; returns how many do.

    In a transformer: the gated pair or first linear of a feed-forward block, for the one behind it.
    """
    writes = Writes(graph)
    count = 0
    for node in graph.find_nodes(op="call_function", target=QUANTIZED):
        wanted, value = codes_wanted(node), tensor_of(node)
        if wanted is None or value is None or writes.touch(node):
            continue
        for reader in list(node.users):
            reader.kwargs = dict(reader.kwargs) | {"dtype": value.dtype}
        node.kwargs = dict(node.kwargs) | wanted
        node.meta[VALUE] = value.to(torch.int8)
        node.meta["qpass_fused"] = (*node.meta.get("qpass_fused", ()), "int8")
        count += 1
    return count


def codes_wanted(node: fx.Node) -> dict[str, Any] | None:
    """How all readers of a quantized_linear quantize its output, as its own arguments; None where they don't, or not alike."""
    wanted: set[tuple] = set()
    for reader in node.users:
        operands = (*reader.args, *reader.kwargs.values())
        if reader.target is not QUANTIZED or reader.args[0] is not node or sum(o is node for o in operands) != 1:
            return None
        if reader.kwargs.get("norm", "none") != "none" or "outliers" in reader.kwargs:
            return None
        wanted.add(tuple(reader.kwargs.get(name) or None for name in ("x_scale", "x_shift", "rotate")))
    if len(wanted) != 1:
        return None
    scale, shift, rotate = wanted.pop()
    found = {"y_scale": scale, "y_shift": shift, "y_rotate": rotate}
    return None if scale is None else {name: value for name, value in found.items() if value is not None}
