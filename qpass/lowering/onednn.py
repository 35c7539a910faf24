"""oneDNN through torch: int8 activations times int8 weights by ``torch._int_mm``, the rest in Inductor."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.cpu import Cpu
from qpass.lowering.epilogue import emit_epilogue
from qpass.lowering.prologue import emit_prologue
from qpass.lowering.site import Site
from qpass.ops.quantized_linear import bound_arguments
from qpass.qactivation import quantize_activation, quantize_by_scale, rotated
from qpass.qweight import QWeight


class OneDNN:
    name = "onednn"
    portable = False

    def same_rows(self, site: Site, cpu: Cpu) -> int:
        return 0

    def refuse(self, site: Site, cpu: Cpu) -> str | None:
        format = site.scheme.weight
        if format is None or format.bits != 8 or site.scheme.activation not in ("a8-token", "a8-static"):
            return "serves int8 weights per channel with int8 activations, static or per token, only"
        if not format.symmetric or format.float_zeros:
            return "serves symmetric int8 weights only"
        return None

    def pack(self, weight: QWeight, *, glu: bool) -> tuple[Tensor, ...]:
        signed = (weight.codes.to(torch.int16) - weight.zeros.to(torch.int16)).to(torch.int8)  # [N, K]
        return signed, weight.scales[:, 0].contiguous()

    def emit(self, graph: fx.Graph, node: fx.Node, packed: tuple[fx.Node, ...]) -> fx.Node:
        args = bound_arguments(node)
        x = args["x"] if args["dtype"] is not None else emit_prologue(graph, node)
        outliers = (args["outliers"], args["outlier_weight"])
        with graph.inserting_before(node):
            y = graph.call_function(int8_linear, (x, *packed, args["x_scale"], *outliers, args["rotate"]))
        return emit_epilogue(graph, node, y)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    x_scale: float | None = None,
    outliers: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    rotate: bool = False,
) -> Tensor:
    """``x [..., K]``, quantized per token or by ``x_scale``, or int8 codes of that, times ``weight`` int8 [N, K]; fp32 [..., N].

    ``outliers`` int64 [C] are left out, and multiplied by ``outlier_weight`` [C, N] as they are. ``rotate``: before quantization.
    """
    rows = x.reshape(-1, x.shape[-1])
    apart: Tensor | None = None
    if outliers is not None and outlier_weight is not None:
        apart = rows.index_select(1, outliers).float() @ outlier_weight.float()
        rows = rows.index_fill(1, outliers, 0.0)
    if rotate and rows.dtype != torch.int8:
        rows = rotated(rows)
    if x_scale is None:
        values, act_scales = quantize_activation(rows, None)
    elif rows.dtype == torch.int8:
        values, act_scales = rows, torch.full_like(rows[:, :1], x_scale, dtype=torch.float32)
    else:
        values, act_scales = quantize_by_scale(rows, x_scale)
    y = torch._int_mm(values.to(torch.int8), weight.t()).float() * act_scales * scales
    return (y if apart is None else y + apart).reshape(*x.shape[:-1], weight.shape[0])
