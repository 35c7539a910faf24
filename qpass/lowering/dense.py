"""A site that stays as it was: its own weights, and around them what the passes have fused, as plain graph nodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from qpass.lowering.epilogue import emit_epilogue
from qpass.lowering.prologue import emit_prologue
from qpass.ops.quantized_linear import bound_arguments


def emit_dense(
    graph: fx.Graph,
    node: fx.Node,
    weights: Sequence[tuple[fx.Node, bool]],
    columns: fx.Node | None = None,
    rows: fx.Node | None = None,
) -> fx.Node:
    """The quantized_linear ``node`` over the full-precision weights [N_i, K] (or transposed) that its codes stand for.

    Where smoothing scaled these by ``columns`` fp32 [K] and ``rows`` fp32 [N], x and y are, which comes to the same.
    """
    x = emit_prologue(graph, node)
    with graph.inserting_before(node):
        if columns is not None:
            x = graph.call_function(torch.mul, (x, columns))
        dtype = bound_arguments(node)["dtype"]
        if dtype is not None:
            x = graph.call_function(torch.Tensor.to, (x, dtype))
        elif x is not node.args[0]:
            x = graph.call_function(torch.Tensor.type_as, (x, node.args[0]))
        matrices = [graph.call_function(torch.t, (w,)) if transposed else w for w, transposed in weights]
        parts = [graph.call_function(torch._C._nn.linear, (x, weight)) for weight in matrices]
        y = parts[0] if len(parts) == 1 else graph.call_function(torch.cat, (parts, -1))
        if rows is not None:
            y = graph.call_function(torch.mul, (y, rows))
    return emit_epilogue(graph, node, y)
