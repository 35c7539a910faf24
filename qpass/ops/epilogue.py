"""What happens to a linear's output before it is rounded: activation, gate, multiply, residual; all in fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
"""By name; a name's index is its number in native code (``cpp/epilogue.h``)."""


def activation_number(name: str) -> int:
    return list(ACTIVATIONS).index(name)


def output_features(n: int, glu: bool) -> int:
    """Columns of the output for N weight rows: a gated pair (gate rows, then up rows) gives half."""
    return n // 2 if glu else n


def apply_epilogue(y: Tensor, activation: str, glu: bool, mul: Tensor | None, residual: Tensor | None) -> Tensor:
    """``act(y)``, or ``act(gate) * up`` when ``glu``; then ``* mul``; then ``+ residual``. fp32 in, fp32 out."""
    if glu:
        gate, up = y.chunk(2, dim=-1)
        y = ACTIVATIONS[activation](gate) * up
    else:
        y = ACTIVATIONS[activation](y)
    if mul is not None:
        y = y * mul.float()
    if residual is not None:
        y = y + residual.float()
    return y


def fake_output(x: Tensor, n: int, glu: bool, dtype: torch.dtype | None = None, y_scale: float | None = None) -> Tensor:
    """``dtype`` None: x's; int8 codes where there is a ``y_scale``."""
    dtype = torch.int8 if y_scale is not None else dtype or x.dtype
    return x.new_empty((*x.shape[:-1], output_features(n, glu)), dtype=dtype, device=x.device)


def check_activation(activation: str) -> None:
    torch._check_value(
        activation in ACTIVATIONS, lambda: f"unknown activation {activation!r}; accepted: {', '.join(ACTIVATIONS)}"
    )
