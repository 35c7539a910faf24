"""Round to nearest: each group's range is its minimum and maximum, each weight goes to the nearest code."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.qweight import QWeight, zero_dtype
from qpass.scheme import Format

AT_ONCE = 1 << 18
"""Weights at a time: a matrix would otherwise need several fp32 copies of itself."""

HALF_TINY = 2.0**-14  # the smallest normal float16


def rtn(weight: Tensor, format: Format) -> QWeight:
    """Quantize ``weight`` [N, K] (any float dtype) without data; a pure function.

    Asymmetric: ``scale = (max - min) / max_code`` with the range widened to hold 0, so that 0 is exact (not so with
    float_zeros). Symmetric: ``scale = absmax / (2**(bits-1) - 1)`` around the middle code. Grouped scales are rounded up to float16, whose
    half size pays in bandwidth, unless one of the tensor's scales is outside of float16's normal range. A group of
    zeros gets scale 1 and codes at its zero. Raises ValueError for a weight that holds NaN or infinity.
    """
    n, k = weight.shape
    group = k if format.group is None else format.group
    groups = format.groups_of(k)
    middle = 1 << (format.bits - 1)
    rows_at_once = max(1, AT_ONCE // k)
    blocks = [slice(start, start + rows_at_once) for start in range(0, n, rows_at_once)]

    scales, lowest = torch.empty(n, groups), torch.empty(n, groups)
    for rows in blocks:
        w = grouped(weight[rows], groups, group)
        low, high = w.amin(dim=2), w.amax(dim=2)
        if not bool(torch.isfinite(low).all()) or not bool(torch.isfinite(high).all()):  # NaN is its group's both ends
            raise ValueError("the weight holds NaN or infinity")
        if format.symmetric:
            scales[rows] = torch.maximum(high, -low) / (middle - 1)
        else:
            if not format.float_zeros:
                low, high = low.clamp_(max=0), high.clamp_(min=0)
            lowest[rows] = low
            scales[rows] = (high - low) / format.max_code
    scales = storable(scales, format)
    zeros = torch.full_like(scales, middle) if format.symmetric else -lowest / scales
    if not format.float_zeros:
        zeros = zeros.round_().clamp_(0, format.max_code)

    codes = torch.empty(n, k, dtype=torch.uint8)
    smallest = 1 if format.symmetric else 0  # keeps symmetric codes symmetric around the middle
    for rows in blocks:
        w = grouped(weight[rows], groups, group)
        w = (w / scales[rows, :, None]).add_(zeros[rows, :, None]).round_().clamp_(smallest, format.max_code)
        codes[rows] = w.view(-1, groups * group)[:, :k].to(torch.uint8)
    return QWeight(codes, scales, zeros.to(zero_dtype(format)), format)


def grouped(weight: Tensor, groups: int, group: int) -> Tensor:
    """Rows in fp32, zeros behind their end: [rows, K/G, G]."""
    w = weight.detach().float()
    return torch.nn.functional.pad(w, (0, groups * group - w.shape[1])).view(-1, groups, group)


def storable(scales: Tensor, format: Format) -> Tensor:
    """Scales that packing keeps exactly: float16 where a group has its own and the range allows, fp32 otherwise."""
    tiny = torch.finfo(torch.float32).tiny
    scales = torch.where(scales > tiny, scales, torch.ones_like(scales))
    if format.group is None or float(scales.min()) < HALF_TINY or float(scales.max()) > 32752.0:
        return scales
    half = scales.half()
    above = (half.view(torch.int16) + 1).view(torch.float16)  # a positive float's next is its bit pattern plus one
    return torch.where(half.float() < scales, above, half).float()
