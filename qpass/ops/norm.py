"""``qpass::norm``: the one spelling of a row's normalization that canonicalize leaves; and what it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.ops.linear import LIBRARY

NORMS = ("none", "rms", "layer")
"""A name's index is its number in native code (``QpassNorm`` in ``cpp/abi.h``)."""

LIBRARY.define("norm(Tensor x, str norm, Tensor? weight, Tensor? bias, float eps, float offset=0.0) -> Tensor")


def normalize(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Each row (last dimension) of ``x`` by itself, in fp32 throughout; ``weight`` and ``bias`` [K]. fp32 out.

    rms: ``x * rsqrt(mean(x^2) + eps) * weight + bias``; layer: the same over ``x - mean(x)``.
    """
    check_norm(norm)
    x = x.float()
    if norm == "none":
        return x
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        x = x * weight.float()
    return x if bias is None else x + bias.float()


def apply_norm(
    x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0
) -> Tensor:
    """:func:`normalize` by ``weight + offset`` (Gemma's weights count from one), rounded once to x's dtype."""
    if weight is not None and offset:
        weight = weight.float() + offset
    return normalize(x, norm, weight, bias, eps).to(x.dtype)


def check_norm(norm: str) -> None:
    torch._check_value(norm in NORMS, lambda: f"unknown norm {norm!r}; accepted: {', '.join(NORMS)}")


def _fake(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


LIBRARY.impl("norm", apply_norm, "CompositeExplicitAutograd")
torch.library.register_fake("qpass::norm", _fake, lib=LIBRARY)
