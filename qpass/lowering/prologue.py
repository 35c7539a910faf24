"""Normalization and shift as plain graph nodes, for the lowerings whose kernels have no prologue: Inductor fuses them."""

from __future__ import annotations

from torch import Tensor, fx

from qpass.ops.prologue import apply_norm_of
from qpass.ops.quantized_linear import bound_arguments
from qpass.qactivation import rotated


def emit_prologue(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What the quantized_linear ``node`` multiplies (a16, in x's dtype) or quantizes (a8, fp32): x, normalized and shifted if it says so."""
    args = bound_arguments(node)
    x: fx.Node = args["x"]
    if args["dtype"] is not None:  # int8 codes
        with graph.inserting_before(node):
            return graph.call_function(dequantize, (x, args["x_scale"], args["rotate"]))
    operands = (args["rule"], args["norm"], args["norm_weight"], args["norm_bias"], args["norm_eps"])
    with graph.inserting_before(node):
        if args["norm"] != "none":
            x = graph.call_function(apply_norm_of, (x, *operands))
        return graph.call_function(shifted, (x, args["x_shift"])) if args["x_shift"] else x


def shifted(x: Tensor, shift: float) -> Tensor:
    """fp32."""
    return x.float() - shift


def dequantize(x: Tensor, scale: float, rotate: bool) -> Tensor:
    """int8 codes as fp32, turned back where they were rotated."""
    return rotated(x.float() * scale) if rotate else x.float() * scale
