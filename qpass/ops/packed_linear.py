"""``qpass::packed_linear``: the generated kernels' entry. Its CPU implementation is ``kernels/cpp/binding_linear.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.ops.epilogue import fake_output
from qpass.ops.linear import LIBRARY

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""By number, as ``QpassDtype`` in ``kernels/cpp/abi.h`` has them."""

LIBRARY.define(
    "packed_linear(Tensor x, Tensor packed, Tensor? bias, Tensor? mul, Tensor? residual,"
    " SymInt n, SymInt k, int format, int activation, bool glu, int norm=0, Tensor? norm_weight=None,"
    " Tensor? norm_bias=None, float norm_eps=0.0, float? x_scale=None, Tensor? outliers=None, Tensor? outlier_weight=None,"
    " float? y_scale=None, int? dtype=None, bool rotate=False, bool y_rotate=False,"
    " float x_shift=0.0, float y_shift=0.0) -> Tensor"
)


def _fake(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    mul: Tensor | None,
    residual: Tensor | None,
    n: int,
    k: int,
    format: int,
    activation: int,
    glu: bool,
    norm: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    x_scale: float | None = None,
    outliers: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    y_scale: float | None = None,
    dtype: int | None = None,
    rotate: bool = False,
    y_rotate: bool = False,
    x_shift: float = 0.0,
    y_shift: float = 0.0,
) -> Tensor:
    """``x [..., K]`` -> [..., N], or [..., N/2] when ``glu``; contiguous.

    y has x's dtype; for an int8 x the one that ``dtype`` numbers (:data:`DTYPES`); with a ``y_scale`` it is int8.
    """
    torch._check(x.shape[-1] == k, lambda: f"packed_linear: x has {x.shape[-1]} inputs, the weight {k}")
    return fake_output(x, n, glu, x.dtype if dtype is None else DTYPES[dtype], y_scale)


torch.library.register_fake("qpass::packed_linear", _fake, lib=LIBRARY)
