"""What happens to a linear's input before it is multiplied: normalization in fp32, then int8 quantization or one rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.ops.norm import normalize


def apply_norm_of(x: Tensor, rule: str, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``x [..., K]`` normalized. a16 multiplies it rounded once to x's dtype; a8 quantizes it as it is, in fp32."""
    if norm == "none":
        return x
    y = normalize(x, norm, weight, bias, eps)
    return y.to(x.dtype) if rule == "a16" else y


def quantize_activation(x: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric int8: values [M, K] as fp32 integers in -127..127 and scales [M, K/G].

    Each token (``group`` None: K inputs) or each group of a token is scaled by its own largest magnitude, so a row's
    result depends on no other row. A group of zeros has scale 1.
    """
    m, k = x.shape
    length = k if group is None else group
    padded = torch.nn.functional.pad(x.float(), (0, -k % length)).view(m, -1, length)
    amax = padded.abs().amax(dim=2)
    amax = torch.where(amax > 0, amax, torch.full_like(amax, 127.0))
    inverse = torch.full_like(amax, 127.0) / amax  # `127.0 / amax` would be a rounded reciprocal times 127
    values = (padded * inverse[..., None]).round().clamp_(-127, 127)
    return values.view(m, -1)[:, :k], amax / 127.0


def quantize_by_scale(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Static symmetric int8: values [M, K] and scales [M, 1], all of them ``scale``; what lies beyond is clamped."""
    scales = x.new_full((x.shape[0], 1), scale, dtype=torch.float32)
    values = (x.float() * (torch.ones_like(scales) / scales)).round().clamp_(-127, 127)
    return values, scales


def check_x_scale(rule: str, x_scale: float | None) -> None:
    torch._check_value(
        (x_scale is not None) == (rule == "a8-static"),
        lambda: f"rule {rule!r} takes {'one x_scale' if rule == 'a8-static' else 'no x_scale'}, not {x_scale}",
    )
    torch._check_value(
        x_scale is None or 0 < x_scale < float("inf"), lambda: f"x_scale must be positive and finite, not {x_scale}"
    )
