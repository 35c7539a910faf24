"""torch's own weight-only kernels: int8 per channel, int4 grouped; written for bf16 activations."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.cpu import Cpu
from qpass.lowering.epilogue import emit_epilogue
from qpass.lowering.prologue import emit_prologue
from qpass.lowering.site import Site
from qpass.qweight import QWeight


class Aten:
    name = "aten"
    portable = False

    def same_rows(self, site: Site, cpu: Cpu) -> int:
        return 0

    def refuse(self, site: Site, cpu: Cpu) -> str | None:
        format = site.scheme.weight
        if format is None or site.scheme.activation != "a16":
            return "serves 16-bit activations only"
        if site.dtype != torch.bfloat16:
            return f"its kernels are scalar loops for {str(site.dtype).removeprefix('torch.')}; they serve bfloat16"
        if format.bits == 8:
            return (
                None
                if format.group is None and format.symmetric
                else "serves int8 weights symmetric and per channel only"
            )
        if format.group is None:
            return "serves int4 weights in groups only"
        if format.group < 32:
            return f"serves groups of 32 to 256, not {format.group}"
        if site.k % format.group:
            return f"needs K = {site.k} to be a multiple of the group {format.group}"
        if site.n % 16:
            return f"needs N = {site.n} to be a multiple of 16"
        return None

    def pack(self, weight: QWeight, *, glu: bool) -> tuple[Tensor, ...]:
        if weight.format.bits == 8:
            signed = (weight.codes.to(torch.int16) - weight.zeros.to(torch.int16)).to(torch.int8)
            return signed, weight.scales[:, 0].to(torch.bfloat16)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
        # ATen's zero is additive and in weight units: w = (code - 8) * scale + zero.
        additive = (8.0 - weight.zeros.float()) * weight.scales
        return packed, torch.stack((weight.scales, additive), dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()

    def emit(self, graph: fx.Graph, node: fx.Node, packed: tuple[fx.Node, ...]) -> fx.Node:
        x, (bits, group) = emit_prologue(graph, node), node.args[5:7]
        with graph.inserting_before(node):
            if bits == 8:
                y = graph.call_function(int8_weight_only, (x, *packed))
            else:
                y = graph.call_function(int4_weight_only, (x, *packed, group))
        return emit_epilogue(graph, node, y)


def int8_weight_only(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return torch.ops.aten._weight_int8pack_mm(rows, weight, scales).reshape(*x.shape[:-1], weight.shape[0])


def int4_weight_only(x: Tensor, packed: Tensor, scales_and_zeros: Tensor, group: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group, scales_and_zeros)
    return y.reshape(*x.shape[:-1], scales_and_zeros.shape[1])
