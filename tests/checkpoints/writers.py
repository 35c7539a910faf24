"""Layers as other programs store them, written from the layouts' published descriptions: whole models for the tests.

What the libraries themselves write is in tests/golden/checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qpass.algorithms.rtn import rtn
from qpass.qweight import QWeight
from qpass.scheme import Format

Writer = Callable[[QWeight, Tensor], dict[str, Tensor]]
"""A layer's codes, in the order of its inputs, and the group of each input -> tensors by the last part of their names."""


def words(rows: Tensor, bits: int) -> Tensor:
    """Codes [R, C] as int32 words [R, C * bits / 32]: little-endian streams, one bit at a time."""
    stream = (rows.long().unsqueeze(-1) >> torch.arange(bits) & 1).flatten(1).unflatten(1, (-1, 32))
    return (stream << torch.arange(32)).sum(-1).to(torch.int64).to(torch.int32)


def gptq(weight: QWeight, g_idx: Tensor, offset: int = 1) -> dict[str, Tensor]:
    bits = weight.format.bits
    return {
        "qweight": words(weight.codes, bits).t().contiguous(),
        "qzeros": words((weight.zeros.t().long() - offset) & weight.format.max_code, bits),
        "scales": weight.scales.t().half().contiguous(),
        "g_idx": g_idx.int(),
    }


def awq(weight: QWeight, g_idx: Tensor) -> dict[str, Tensor]:
    def interleaved(rows: Tensor) -> Tensor:
        return words(rows.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    return {
        "qweight": interleaved(weight.codes.t()),
        "qzeros": interleaved(weight.zeros.t()),
        "scales": weight.scales.t().half().contiguous(),
    }


def convert(
    source: Path,
    target: Path,
    writer: Writer,
    config: dict[str, Any],
    *,
    format_of: Callable[[str], Format],
    act_order: bool = False,
) -> dict[str, Tensor]:
    """Write the checkpoint ``source`` with all linear layers of its blocks quantized; returns their values [N, K]."""
    target.mkdir(exist_ok=True)
    tensors, values = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor.half()
            continue
        module = name.removesuffix(".weight")
        format, k = format_of(module), tensor.shape[1]
        g_idx = torch.arange(k) // (format.group or k)
        order = torch.arange(k)
        if act_order:
            order = torch.randperm(k, generator=torch.Generator().manual_seed(len(name)))
            g_idx = torch.empty_like(g_idx).index_copy_(0, order, g_idx)
        ordered = rtn(tensor.float()[:, order], format)
        back = torch.argsort(order)
        weight = QWeight(ordered.codes[:, back].contiguous(), ordered.scales.half().float(), ordered.zeros, format)
        tensors |= {f"{module}.{part}": value for part, value in writer(weight, g_idx).items()}
        exact = QWeight(ordered.codes, weight.scales, ordered.zeros, format).dequantize()
        values[module] = exact[:, back]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    whole = json.loads((target / "config.json").read_text()) | {"quantization_config": config}
    (target / "config.json").write_text(json.dumps(whole))
    return values
