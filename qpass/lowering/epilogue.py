"""Bias and epilogue as plain graph nodes, for the lowerings whose kernels have none: Inductor fuses them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.ops.epilogue import apply_epilogue
from qpass.ops.quantized_linear import bound_arguments, round_output

_PARTS = ("bias", "activation", "glu", "mul", "residual", "y_scale", "y_shift", "y_rotate")


def emit_epilogue(graph: fx.Graph, node: fx.Node, y: fx.Node) -> fx.Node:
    """Put what the quantized_linear ``node`` does behind its product ``y`` (any float dtype, [..., N]) before it."""
    args = bound_arguments(node)
    with graph.inserting_before(node):
        return graph.call_function(
            finish,
            (args["x"], args["dtype"], y, *(args[part] for part in _PARTS)),
        )


def finish(
    x: Tensor,
    dtype: torch.dtype | None,
    y: Tensor,
    bias: Tensor | None,
    activation: str,
    glu: bool,
    mul: Tensor | None,
    residual: Tensor | None,
    y_scale: float | None,
    y_shift: float,
    y_rotate: bool,
) -> Tensor:
    y = y.float()
    if bias is not None:
        y = y + bias
    y = apply_epilogue(y, activation, glu, mul, residual)
    return round_output(y, dtype or x.dtype, y_scale, y_shift, y_rotate)
