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


def check_quantizer(rule: str, x_scale: float | None, x_shift: float = 0.0) -> None:
    torch._check_value(
        (x_scale is not None) == (rule == "a8-static"),
        lambda: f"rule {rule!r} takes {'one x_scale' if rule == 'a8-static' else 'no x_scale'}, not {x_scale}",
    )
    torch._check_value(
        x_shift == 0 or (rule == "a8-static" and abs(x_shift) < float("inf")),
        lambda: f"x_shift must be finite, and zero unless the rule is 'a8-static', not {x_shift} for {rule!r}",
    )
    torch._check_value(
        x_scale is None or 0 < x_scale < float("inf"), lambda: f"x_scale must be positive and finite, not {x_scale}"
    )
