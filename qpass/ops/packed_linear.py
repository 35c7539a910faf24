"""``qpass::packed_linear``: the generated kernels' entry. Its CPU implementation is ``kernels/cpp/binding.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.ops.epilogue import fake_output
from qpass.ops.linear import LIBRARY

LIBRARY.define(
    "packed_linear(Tensor x, Tensor packed, Tensor? bias, Tensor? mul, Tensor? residual,"
    " SymInt n, SymInt k, int format, int activation, bool glu) -> Tensor"
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
) -> Tensor:
    """``x [..., K]`` -> [..., N], or [..., N/2] when ``glu``; x's dtype, contiguous."""
    torch._check(x.shape[-1] == k, lambda: f"packed_linear: x has {x.shape[-1]} inputs, the weight {k}")
    return fake_output(x, n, glu)


torch.library.register_fake("qpass::packed_linear", _fake, lib=LIBRARY)
