"""A site that stays as it was: its own weights, and around them what the passes have fused, as plain graph nodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from qpass.lowering.epilogue import emit_epilogue
from qpass.lowering.prologue import emit_prologue


def emit_dense(graph: fx.Graph, node: fx.Node, weights: Sequence[tuple[fx.Node, bool]]) -> fx.Node:
    """The quantized_linear ``node`` over the full-precision weights [N_i, K] (or transposed) that its codes stand for."""
    x = emit_prologue(graph, node)
    with graph.inserting_before(node):
        if x is not node.args[0]:
            x = graph.call_function(torch.Tensor.type_as, (x, node.args[0]))
        rows = [graph.call_function(torch.t, (w,)) if transposed else w for w, transposed in weights]
        parts = [graph.call_function(torch._C._nn.linear, (x, weight)) for weight in rows]
        y = parts[0] if len(parts) == 1 else graph.call_function(torch.cat, (parts, -1))
    return emit_epilogue(graph, node, y)
