"""oneDNN through torch: int8 activations times int8 weights by ``torch._int_mm``, the rest in Inductor."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.cpu import Cpu
from qpass.lowering.epilogue import emit_epilogue
from qpass.lowering.prologue import emit_prologue
from qpass.lowering.site import Site
from qpass.qweight import QWeight


class OneDNN:
    name = "onednn"
    portable = False

    def same_rows(self, site: Site, cpu: Cpu) -> int:
        return 0

    def refuse(self, site: Site, cpu: Cpu) -> str | None:
        format = site.scheme.weight
        if format is None or format.bits != 8 or site.scheme.activation != "a8-token":
            return "serves int8 weights per channel with int8 activations per token only"
        if not format.symmetric or format.float_zeros:
            return "serves symmetric int8 weights only"
        return None

    def pack(self, weight: QWeight, *, glu: bool) -> tuple[Tensor, ...]:
        signed = (weight.codes.to(torch.int16) - weight.zeros.to(torch.int16)).to(torch.int8)  # [N, K]
        return signed, weight.scales[:, 0].contiguous()

    def emit(self, graph: fx.Graph, node: fx.Node, packed: tuple[fx.Node, ...]) -> fx.Node:
        x = emit_prologue(graph, node)
        with graph.inserting_before(node):
            y = graph.call_function(int8_linear, (x, *packed))
        return emit_epilogue(graph, node, y)


def int8_linear(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """``x [..., K]``, quantized per token, times ``weight`` int8 [N, K]; fp32 [..., N]."""
    rows = x.reshape(-1, x.shape[-1]).float()
    amax = rows.abs().amax(dim=1, keepdim=True)
    amax = torch.where(amax > 0, amax, 127.0)
    values = (rows * (torch.full_like(amax, 127.0) / amax)).round().clamp(-127, 127).to(torch.int8)
    y = torch._int_mm(values, weight.t()).float() * (amax / 127.0) * scales
    return y.reshape(*x.shape[:-1], weight.shape[0])
