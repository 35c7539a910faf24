"""What a linear's input looks like over a calibration set: extremes, a histogram and a few rows, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

BINS = 2048
"""Of the histogram of magnitudes; its range doubles as larger values come, two bins becoming one."""

SAMPLE = 112
"""Rows kept at random, each as likely as any other."""

EXTREMES = 16
"""Rows kept for their largest magnitude: attention sinks are one token in hundreds, and the model rests on them."""


@dataclass
class Observer:
    """A stream of rows ``x [M, K]``, seen once each; what is kept does not grow with M.

    low, high   fp32 [K]     each channel's least and greatest value
    squares     fp64 [K]     sum of squares of each channel: the Hessian's diagonal is ``2 * squares / rows``. None: not asked for
    histogram   int64 [BINS] of all magnitudes, over ``0 .. limit``
    sample      [<= SAMPLE, K] in x's dtype, with ``priorities`` fp64, the smallest of one random number a row
    extremes    [<= EXTREMES, K] in x's dtype, with ``peaks`` fp32, the rows with the largest magnitudes
    """

    k: int
    dtype: torch.dtype
    hessian: bool = False
    seed: int = 0
    rows: int = 0
    limit: float = 0.0
    low: Tensor = field(init=False)
    high: Tensor = field(init=False)
    squares: Tensor | None = field(init=False)
    histogram: Tensor = field(init=False)
    sample: Tensor = field(init=False)
    priorities: Tensor = field(init=False)
    extremes: Tensor = field(init=False)
    peaks: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.low, self.high = torch.zeros(self.k), torch.zeros(self.k)
        self.squares = torch.zeros(self.k, dtype=torch.float64) if self.hessian else None
        self.histogram = torch.zeros(BINS, dtype=torch.int64)
        self.sample, self.priorities = torch.zeros(0, self.k, dtype=self.dtype), torch.zeros(0, dtype=torch.float64)
        self.extremes, self.peaks = torch.zeros(0, self.k, dtype=self.dtype), torch.zeros(0)

    def see(self, x: Tensor) -> None:
        """Take in ``x [..., K]``. Raises ValueError for NaN or infinity; nothing is taken in then."""
        x = x.detach().reshape(-1, self.k)
        if not x.shape[0]:
            return
        magnitudes = x.abs().float()
        peaks = magnitudes.amax(dim=1)
        if not bool(torch.isfinite(peaks).all()):
            raise ValueError("NaN or infinity")
        low, high = (end.float() for end in torch.aminmax(x, dim=0))
        self.low = low if self.rows == 0 else torch.minimum(self.low, low)
        self.high = high if self.rows == 0 else torch.maximum(self.high, high)
        if self.squares is not None:
            self.squares += magnitudes.square().sum(dim=0, dtype=torch.float64)
        self._count(magnitudes, float(peaks.max()))
        generator = torch.Generator().manual_seed((self.seed << 32) + self.rows)
        priorities = torch.rand(x.shape[0], generator=generator, dtype=torch.float64)
        self.sample, self.priorities = _keep(self.sample, self.priorities, x, priorities, SAMPLE, largest=False)
        self.extremes, self.peaks = _keep(self.extremes, self.peaks, x, peaks, EXTREMES, largest=True)
        self.rows += x.shape[0]

    def _count(self, magnitudes: Tensor, peak: float) -> None:
        if self.limit == 0.0 and peak > 0.0:
            self.limit = peak
            self.histogram[0] += self.rows * self.k  # zeros so far
        while peak > self.limit:
            self.limit *= 2
            halved = self.histogram.view(-1, 2).sum(dim=1)
            self.histogram.zero_()[: BINS // 2] = halved
        if self.limit == 0.0:
            return
        self.histogram += torch.histc(magnitudes, BINS, 0.0, self.limit).to(torch.int64)

    def percentile(self, share: float) -> float:
        """The magnitude below which ``share`` (0..1) of all values lie, to the width of a bin."""
        total = int(self.histogram.sum())
        if not total:
            return 0.0
        reached = int((self.histogram.cumsum(0) < share * total).sum()) + 1
        return min(reached * self.limit / BINS, self.peak)

    @property
    def absmax(self) -> Tensor:
        """The largest magnitude of each channel, fp32 [K]."""
        return torch.maximum(self.high, -self.low)

    @property
    def peak(self) -> float:
        return float(self.absmax.max())

    def clip(self, levels: int = 127) -> float:
        """The magnitude at which a symmetric static quantizer of ``levels`` steps a side makes the least squared error.

        A value within costs ``step**2 / 12``, one beyond the square of what is cut off. The ends of the bins are the candidates.
        """
        if not self.limit:
            return 1.0
        counts = self.histogram.double()
        centers = (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.limit / BINS
        ends = centers + 0.5 * self.limit / BINS
        inside = counts.cumsum(0)
        above = [(counts * centers**power).flip(0).cumsum(0).flip(0) - counts * centers**power for power in (0, 1, 2)]
        cut = above[2] - 2 * ends * above[1] + ends**2 * above[0]
        errors = inside * (ends / levels) ** 2 / 12 + cut
        return min(float(ends[int(errors.argmin())]), self.peak)

    @property
    def hessian_diagonal(self) -> Tensor | None:
        """``2 E[x^2]`` of each channel, fp32 [K]: the diagonal of the layer's Hessian (GPTQ, arXiv 2210.17323, section 3)."""
        return None if self.squares is None else (2 * self.squares / max(1, self.rows)).float()

    def weighted_rows(self) -> tuple[Tensor, Tensor]:
        """Rows that stand for all, fp32 [R, K], and how many each stands for [R]: the extremes themselves, the sample the rest."""
        rest = max(0, self.rows - self.extremes.shape[0])
        weights = (
            torch.full((self.sample.shape[0],), rest / max(1, self.sample.shape[0])),
            torch.ones(self.extremes.shape[0]),
        )
        return torch.cat((self.sample, self.extremes)).float(), torch.cat(weights)


def _keep(
    kept: Tensor, keys: Tensor, new: Tensor, new_keys: Tensor, count: int, *, largest: bool
) -> tuple[Tensor, Tensor]:
    """The ``count`` rows with the largest or smallest keys, of those kept and the new ones."""
    _, best = new_keys.topk(min(count, len(new_keys)), largest=largest)
    rows, keys = torch.cat((kept, new[best])), torch.cat((keys, new_keys[best]))
    if len(keys) <= count:
        return rows, keys
    values, best = keys.topk(count, largest=largest)
    return rows[best], values
