"""Round to nearest: each group's range is its minimum and maximum, each weight goes to the nearest code."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.qweight import MOST_MULTIPLE, SIGNED_BYTE, QWeight, row_scale, zero_dtype
from qpass.scheme import Format

AT_ONCE = 1 << 18
"""Weights at a time: a matrix would otherwise need several fp32 copies of itself."""

HALF_TINY = 2.0**-14  # the smallest normal float16


def rtn(weight: Tensor, format: Format) -> QWeight:
    """Quantize ``weight`` [N, K] (any float dtype) without data; a pure function.

    Asymmetric: ``scale = (max - min) / max_code`` with the range widened to hold 0, so that 0 is exact (not so with
    float_zeros). Symmetric: ``scale = absmax / (2**(bits-1) - 1)`` around the middle code. Grouped scales are rounded up to float16, whose
    half size pays in bandwidth, unless one of the tensor's scales is outside of float16's normal range; integer scales go to
    the nearest multiple. A group of zeros gets any scale and codes at its zero. Raises ValueError for a weight that holds NaN or infinity.
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
    scales, zeros = ranged(scales, lowest, format)

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


def ranged(scales: Tensor, lowest: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Storable scales and their zeros, fp32 [N, K/G], of ranges that begin at ``lowest`` [N, K/G]."""

    def zeros_of(scales: Tensor) -> Tensor:
        if format.symmetric:
            return torch.full_like(scales, 1 << (format.bits - 1))
        zeros = -lowest / scales
        return zeros if format.float_zeros else zeros.round_().clamp_(0, format.max_code)

    if not format.integer_scales:
        scales = storable(scales, format)
        return scales, zeros_of(scales)
    scales, times = whole_multiples(scales, zeros_of(_positive(scales)), format)
    most = (SIGNED_BYTE / times).floor()  # a zero moved with its scale
    return scales, zeros_of(scales).minimum(most).maximum((format.max_code - most).clamp(min=0))


def whole_multiples(scales: Tensor, zeros: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """The nearest scales [N, K/G] that are whole multiples of one a row, and the multiples, both fp32.

    The row's scale is as small as products of signed bytes allow.
    """
    reach = torch.maximum(zeros, format.max_code - zeros)
    most = (SIGNED_BYTE / reach).floor().clamp(max=MOST_MULTIPLE)
    own = row_scale((scales / most).amax(dim=1, keepdim=True))
    times = (scales / own).round().clamp(min=1).minimum(most)
    return times * own, times


def _positive(scales: Tensor) -> Tensor:
    return torch.where(scales > torch.finfo(torch.float32).tiny, scales, torch.ones_like(scales))


def storable(scales: Tensor, format: Format) -> Tensor:
    """Scales that packing keeps exactly: float16 where a group has its own and the range allows, fp32 otherwise."""
    scales = _positive(scales)
    if format.group is None or float(scales.min()) < HALF_TINY or float(scales.max()) > 32752.0:
        return scales
    half = scales.half()
    above = (half.view(torch.int16) + 1).view(torch.float16)  # a positive float's next is its bit pattern plus one
    return torch.where(half.float() < scales, above, half).float()
