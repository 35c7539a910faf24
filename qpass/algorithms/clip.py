"""Clipping: a group's range shrunk to where its squared error is least, with data or without.

The range from minimum to maximum spends codes on a few outliers. The search walks shrunken ranges and neighboring zeros
and keeps the best for each group: without data the plain squared error (as in 1810.05723, section 3), with data the error
of the layer's output, which AWQ calls weight clipping (2306.00978, section 3.2 and its code).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qpass.algorithms.rtn import grouped, ranged, storable, whole_multiples
from qpass.qweight import QWeight, zero_dtype
from qpass.scheme import Format

Cost = Callable[[Tensor], Tensor]
"""What errors [rows, K/G, G] cost each row and group, [rows, K/G]; it may overwrite the errors."""

STEPS = 24
"""Shrunken ranges that are tried, evenly from the whole one down to :func:`lowest_shrink`."""

CHUNK = 1 << 17
"""Weights at a time: the search passes over them dozens of times and should find them in the cache."""


def clip(weight: Tensor, format: Format, importance: Tensor | None = None) -> QWeight:
    """Quantize ``weight`` [N, K] to the nearest codes of clipped ranges; a pure function.

    ``importance`` is what a squared error costs: a number per input [K] (the Hessian's diagonal), or a matrix per
    group [K/G, G, G] (its diagonal blocks, padded with zeros behind K). None: all alike, for which no data is needed.
    Raises ValueError for a weight or an importance that holds NaN or infinity.
    """
    return nearest(weight, *fit(weight, format, importance), format)


def nearest(weight: Tensor, scales: Tensor, zeros: Tensor, format: Format) -> QWeight:
    """The nearest codes of given ``scales`` and ``zeros``, both fp32 [N, K/G]."""
    n, k = weight.shape
    groups, group = scales.shape[1], format.group or k
    codes = torch.empty(n, k, dtype=torch.uint8)
    for rows in _chunks(n, k):
        w = grouped(weight[rows], groups, group) / scales[rows, :, None]
        w = w.add_(zeros[rows, :, None]).round_().clamp_(0, format.max_code)
        codes[rows] = w.view(-1, groups * group)[:, :k].to(torch.uint8)
    return QWeight(codes, scales, zeros.to(zero_dtype(format)), format)


def fit(weight: Tensor, format: Format, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zeros, fp32 [N, K/G], whose nearest codes cost the least; arguments and errors as for :func:`clip`."""
    n, k = weight.shape
    groups, group = format.groups_of(k), format.group or k
    cost = _cost_of(importance, groups, group)
    scales, zeros = torch.empty(n, groups), torch.empty(n, groups)
    for rows in _chunks(n, k):
        w = grouped(weight[rows], groups, group)
        if not bool(torch.isfinite(w).all()):
            raise ValueError("the weight holds NaN or infinity")
        scales[rows], zeros[rows] = _fit_chunk(w, format, cost)
        if format.integer_scales:  # a group of zeros has no say in its row's scale
            scales[rows] *= w.abs().amax(dim=2) > 0
    return (whole_multiples(scales, zeros, format)[0] if format.integer_scales else storable(scales, format)), zeros


def span(weight: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Scales and zeros, fp32 [N, K/G], of the whole range from minimum to maximum: those of round to nearest."""
    n, k = weight.shape
    groups, group = format.groups_of(k), format.group or k
    scales, lowest = torch.empty(n, groups), torch.empty(n, groups)
    for rows in _chunks(n, k):
        w = grouped(weight[rows], groups, group)
        if format.symmetric:
            scales[rows] = w.abs().amax(dim=2) / ((1 << (format.bits - 1)) - 1)
        else:
            low, high = _ends(w, format)
            lowest[rows], scales[rows] = low, (high - low) / format.max_code
    return ranged(scales, lowest, format)


def _fit_chunk(w: Tensor, format: Format, cost: Cost) -> tuple[Tensor, Tensor]:
    whole, middle = whole_range(w, format)
    best_scales, best_zeros = whole.clone(), middle.clone()
    best = torch.full_like(whole, float("inf"))
    shrinks = torch.linspace(1.0, lowest_shrink(format), STEPS).tolist()
    center = w.amin(dim=2).add_(w.amax(dim=2)).div_(2) if format.float_zeros else None
    for shift in (0.0,) if format.symmetric or format.float_zeros else (0.0, -1.0, 1.0):
        zeros = (middle + shift).clamp_(0, format.max_code) if center is None else middle
        for shrink in shrinks:
            scales = whole * shrink
            if center is not None:  # zeros that may be any number keep the range's middle in its place
                zeros = format.max_code / 2 - center / scales
            step, zero = scales[:, :, None], zeros[:, :, None]
            error = (w / step).add_(zero).round_().clamp_(0, format.max_code).sub_(zero).mul_(step).sub_(w)
            spent = cost(error)
            better = spent < best
            best = torch.where(better, spent, best)
            best_scales = torch.where(better, scales, best_scales)
            best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def whole_range(w: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Scales and zeros [rows, K/G] of whole ranges; scale 1 for a group of zeros."""
    if format.symmetric:
        middle = 1 << (format.bits - 1)
        scales = _positive(w.abs().amax(dim=2) / (middle - 1))
        return scales, torch.full_like(scales, middle)
    low, high = _ends(w, format)
    scales = _positive((high - low) / format.max_code)
    return scales, _zeros(low, scales, format)


def _ends(w: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Each group's least and greatest weight, with 0 between them unless zeros may be any number."""
    low, high = w.amin(dim=2), w.amax(dim=2)
    return (low, high) if format.float_zeros else (low.clamp_(max=0), high.clamp_(min=0))


def _zeros(low: Tensor, scales: Tensor, format: Format) -> Tensor:
    zeros = -low / scales
    return zeros if format.float_zeros else zeros.round_().clamp_(0, format.max_code)


def _positive(scales: Tensor) -> Tensor:
    return torch.where(scales > torch.finfo(torch.float32).tiny, scales, torch.ones_like(scales))


def lowest_shrink(format: Format) -> float:
    """Fewer codes cut off more: the best range of a normal group of 128 is 0.9 of the whole at 4 bits, 0.5 at 2."""
    return {2: 0.3, 3: 0.45, 4: 0.55}.get(format.bits, 0.8)


def _cost_of(importance: Tensor | None, groups: int, group: int) -> Cost:
    if importance is None:
        return lambda error: error.square_().sum(dim=2)
    if not bool(torch.isfinite(importance).all()):
        raise ValueError("the importance holds NaN or infinity")
    if importance.dim() == 1:
        each = grouped(importance[None], groups, group)
        if bool((each == 0).all(dim=2).any()):
            each = each + 1e-6 * each.mean().clamp(min=1e-30)  # a group that no input reached still wants its range
        return lambda error: error.square_().mul_(each).sum(dim=2)
    if tuple(importance.shape) != (groups, group, group):
        raise ValueError(
            f"importance must be [K] or [K/G, G, G] = {[groups, group, group]}, not {list(importance.shape)}"
        )
    blocks = importance.float()
    loads = blocks.diagonal(dim1=1, dim2=2).mean(dim=1)  # [K/G]
    ridge = 0.01 * loads + 1e-6 * loads.mean().clamp(min=1e-30)
    blocks = blocks + ridge[:, None, None] * torch.eye(group)

    def cost(error: Tensor) -> Tensor:
        by_group = error.transpose(0, 1)  # [K/G, rows, G]
        return torch.bmm(by_group, blocks).mul_(by_group).sum(dim=2).t()

    return cost


def blocks_of(hessian: Tensor, format: Format) -> Tensor:
    """The diagonal blocks [K/G, G, G] of a Hessian [K, K], one a group; its diagonal [K] for a format without groups."""
    k, group = hessian.shape[0], format.group
    if group is None:
        return hessian.diagonal().clone()
    groups = format.groups_of(k)
    blocks = torch.zeros(groups, group, group)
    for index in range(groups):
        part = slice(index * group, min(k, (index + 1) * group))
        size = part.stop - part.start
        blocks[index, :size, :size] = hessian[part, part]
    return blocks


def _chunks(n: int, k: int) -> list[slice]:
    rows = max(1, CHUNK // k)
    return [slice(start, start + rows) for start in range(0, n, rows)]
