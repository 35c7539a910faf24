"""Ranges found one group after the other, each for the output error of the whole row, given the errors of the others.

Clipping as AWQ has it (2306.00978, section 3.2) takes a group's own output error, as if other groups had none. But inputs
of different groups move together, so errors of different groups add up or cancel: with H the second moments, a row's error
is sum_gh e_g H_gh e_h, and group g sees e_g H_gg e_g + 2 e_g . (sum_{h != g} H_gh e_h). A range is still all that is chosen;
each weight goes to the nearest code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.algorithms.clip import CHUNK, STEPS, blocks_of, clip, lowest_shrink, nearest, whole_range
from qpass.algorithms.rtn import storable
from qpass.qweight import QWeight
from qpass.scheme import Format

SWEEPS = 2
"""Times over all groups: a third takes another percent off the error."""

FIRST = [(float(step), 0.0) for step in range(STEPS)], [(d, z) for d in (-1.0, 0.0, 1.0) for z in (-1.0, 1.0)]
"""What a range is tried as: steps down from the whole one; then, about the best of these, with the zeros beside its own."""

LATER = (
    [(0.0, 0.0)],
    [(d, 0.0) for d in (-2.0, -1.0, 1.0, 2.0)],
    [(d, z) for d in (-1.0, 0.0, 1.0) for z in (-1.0, 1.0)],
)


def descend(weight: Tensor, format: Format, hessian: Tensor, *, sweeps: int = SWEEPS) -> QWeight:
    """Quantize ``weight`` [N, K] to the nearest codes of ranges that leave the least tr(E H E^T); a pure function.

    ``hessian`` [K, K]: second moments of the input, any scale. A format without groups, or with integer scales, whose
    ranges depend on each other already, is clipped by its groups' own errors. Raises ValueError for NaN or infinity.
    """
    group = format.group
    if group is None or format.integer_scales:
        return clip(weight, format, blocks_of(hessian, format))
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(hessian).all()):
        raise ValueError("the weight or the Hessian holds NaN or infinity")
    weight = weight.detach().float()
    n, k = weight.shape
    ridge = 1e-6 * float(hessian.diagonal().mean()) + 1e-30
    parts = [slice(start, min(k, start + group)) for start in range(0, k, group)]
    owns = [hessian[part, part] + ridge * torch.eye(part.stop - part.start) for part in parts]
    rows_at_once = max(1, CHUNK // group)
    searches = [
        [_Range(weight[first : first + rows_at_once, part], format, own) for first in range(0, n, rows_at_once)]
        for part, own in zip(parts, owns, strict=True)
    ]
    error = torch.cat([torch.cat([rows.error for rows in column]) for column in searches], dim=1)  # [N, K]
    for sweep in range(sweeps):
        for part, own, column in zip(parts, owns, searches, strict=True):
            others = (error @ hessian[:, part]).addmm_(error[:, part], own, alpha=-1)  # [N, G]
            for rows, theirs in zip(column, others.split(rows_at_once), strict=True):
                rows.search(theirs, LATER if sweep else FIRST)
            error[:, part] = torch.cat([rows.error for rows in column])
    scales, zeros = (
        torch.stack([torch.cat([getattr(rows, name) for rows in column]) for column in searches], dim=1)
        for name in ("scales", "zeros")
    )
    return nearest(weight, storable(scales, format), zeros, format)


class _Range:
    """One group's range in some rows: steps down from the whole one, and the zero beside the whole range's own, a row each."""

    def __init__(self, weight: Tensor, format: Format, own: Tensor) -> None:
        self.weight, self.format, self.own = weight, format, own
        whole, middle = whole_range(weight[:, None], format)
        self.whole, self.middle = whole[:, 0], middle[:, 0]
        self.center = (weight.amin(dim=1) + weight.amax(dim=1)) / 2 if format.float_zeros else None
        self.shrink = (1.0 - lowest_shrink(format)) / (STEPS - 1)
        self.step, self.shift = torch.zeros(len(weight)), torch.zeros(len(weight))
        self.scales, self.zeros, self.error = self._made(self.step, self.shift)

    def search(self, others: Tensor, stages: tuple[list[tuple[float, float]], ...]) -> None:
        """The best of the candidates, steps and zeros off the best of the stage before; ``others`` [rows, G]: H_gh e_h in sum."""
        least = torch.full_like(self.step, float("inf"))
        moves = not self.format.symmetric and self.center is None
        for candidates in stages:
            step, shift = self.step, self.shift
            for down, beside in candidates:
                if beside and not moves:
                    continue
                tried = (step + down).clamp(0, STEPS - 1), shift + beside
                scales, zeros, error = self._made(*tried)
                cost = (error @ self.own).add_(others, alpha=2).mul_(error).sum(dim=1)
                better = cost < least
                least = torch.where(better, cost, least)
                found = (*tried, scales, zeros)
                kept = (self.step, self.shift, self.scales, self.zeros)
                self.step, self.shift, self.scales, self.zeros = (
                    torch.where(better, new, old) for new, old in zip(found, kept, strict=True)
                )
        _, _, self.error = self._made(self.step, self.shift)

    def _made(self, step: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scales and zeros [rows] and the errors [rows, G] of nearest codes."""
        most = self.format.max_code
        scales, zeros = self.whole * (1.0 - self.shrink * step), (self.middle + shift).clamp_(0, most)
        if self.center is not None:  # zeros that may be any number keep the range's middle in its place
            zeros = most / 2 - self.center / scales
        s, z = scales[:, None], zeros[:, None]
        return scales, zeros, (self.weight / s).add_(z).round_().clamp_(0, most).sub_(z).mul_(s).sub_(self.weight)
