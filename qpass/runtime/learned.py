"""What a controller learns: times that outliers don't move, chances by position, and how far a draft may be believed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

LATEST = 9
"""How many times of a width are remembered."""


class Times:
    """The time of a width 0..most: a robust summary of its latest ones, and straight lines between those that were seen."""

    def __init__(self, summary: Callable[[Sequence[float]], float]) -> None:
        self._summary = summary
        self._seen: dict[int, list[float]] = {}

    def add(self, width: int, ms: float) -> None:
        self._seen[width] = [*self._seen.get(width, [])[1 - LATEST :], ms]

    def samples(self) -> int:
        return sum(map(len, self._seen.values()))

    def condense(self) -> None:
        """Keep one sample of each width, as a guess for circumstances that have changed."""
        for width, times in self._seen.items():
            self._seen[width] = [self._summary(times)]

    def table(self, most: int, at_zero: float) -> list[float]:
        """ms of each width 0..most; ``at_zero`` is that of width 0 where it was not seen.

        What lies half as high again as the line through the widths of more samples may hold a compilation or another
        process: it counts from the second sample on, or from the fourth where other widths say otherwise, which is what
        makes a width worth another try.
        """
        points = {0: at_zero}
        for width, times in sorted(self._seen.items(), key=lambda item: -len(item[1])):
            alone = len(points) == 1
            known = len(times) >= (2 if alone else 4) or (alone and at_zero == 0)
            ms = self._summary(times)
            if known or ms <= 1.5 * _line(points, width):
                points[width] = ms
        return [_line(points, width) for width in range(most + 1)]


def _line(points: dict[int, float], width: int) -> float:
    """The polygon through the points, one of them at 0; beyond the last, on from 0 through the last."""
    if width in points:
        return points[width]
    above = min((w for w in points if w > width), default=None)
    if above is None:
        last = max(points)
        return points[last] + (points[last] - points[0]) / last * (width - last) if last else points[0]
    below = max(w for w in points if w < width)
    return points[below] + (points[above] - points[below]) / (above - below) * (width - below)


def typical(times: Sequence[float]) -> float:
    """The time at a third of the way from the shortest; of up to three the shortest. What disturbs a time adds to it."""
    return sorted(times)[(len(times) - 1) // 3]


def trimmed(times: Sequence[float]) -> float:
    """The mean without the longest fifth, rounded up: for times that differ by themselves, as those of drafts in turn do."""
    kept = sorted(times)[: max(1, len(times) - (len(times) + 4) // 5)]
    return sum(kept) / len(kept)


class Chances:
    """Success by position 1, 2, ..., with fading memory; a position with few trials leans on the mean of all.

    Positions below ``pooled_from`` are of another kind, and lean on the prior alone. The prior counts as ``weight``
    trials at first and fades with the rest, to one.
    """

    LEANING = 5.0  # trials that the mean counts as, at a position

    def __init__(self, prior: float, weight: float, pooled_from: int) -> None:
        self.prior, self.weight, self.pooled_from = prior, weight, pooled_from
        self._hits: list[float] = []
        self._trials: list[float] = []

    def add(self, position: int, hit: bool) -> None:
        missing = position + 1 - len(self._trials)
        self._hits += [0.0] * missing
        self._trials += [0.0] * missing
        self._hits[position] += hit
        self._trials[position] += 1

    def fade(self, memory: float) -> None:
        self._hits = [memory * x for x in self._hits]
        self._trials = [memory * x for x in self._trials]
        self.weight = max(memory * self.weight, min(self.weight, 1.0))

    def forget(self, weight: float) -> None:
        """Keep the chances, with no more than ``weight`` trials behind each."""
        factors = [min(1.0, weight / x) if x else 1.0 for x in self._trials]
        self._hits = [f * x for f, x in zip(factors, self._hits, strict=True)]
        self._trials = [f * x for f, x in zip(factors, self._trials, strict=True)]

    def table(self, most: int) -> list[float]:
        """The chance at each position 0..most; nobody asks for position 0."""
        hits, trials = sum(self._hits[self.pooled_from :]), sum(self._trials[self.pooled_from :])
        mean = (hits + self.weight * self.prior) / (trials + self.weight)
        chances = []
        for i in range(most + 1):
            hits, trials = (self._hits[i], self._trials[i]) if i < len(self._trials) else (0.0, 0.0)
            leaning, others = (self.LEANING, mean) if i >= self.pooled_from else (self.weight, self.prior)
            chances.append((hits + leaning * others) / (trials + leaning))
        return chances


class Calibration:
    """How often a drafted token is accepted, by the draft's own probability of it; at first, as often as that says."""

    EDGES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.99)
    MEMORY, WEIGHT = 0.99, 4.0

    def __init__(self) -> None:
        bounds = (0.0, *self.EDGES, 1.0)
        self._prior = [(low + high) / 2 for low, high in pairwise(bounds)]
        self._hits = [self.WEIGHT * p for p in self._prior]
        self._trials = [self.WEIGHT] * len(self._prior)
        self._all = [0.6 * self.WEIGHT, self.WEIGHT]  # of all tokens: accepted, tried

    def add(self, confidences: Sequence[Sequence[float]], accepted: Sequence[int]) -> None:
        """Of each row, the tokens up to the first that was refused (those behind it were not judged)."""
        for row, kept in zip(confidences, accepted, strict=False):
            for place, confidence in enumerate(row[: kept + 1]):
                hit, bin = float(place < kept), bisect_right(self.EDGES, confidence)
                excess = self._trials[bin] - self.WEIGHT  # the prior doesn't fade
                if excess > 1 / (1 - self.MEMORY):
                    self._hits[bin] *= self.MEMORY
                    self._trials[bin] *= self.MEMORY
                self._hits[bin] += hit
                self._trials[bin] += 1
                self._all = [0.97 * self._all[0] + hit, 0.97 * self._all[1] + 1]

    def chance(self, confidence: float) -> float:
        bin = bisect_right(self.EDGES, confidence)
        return self._hits[bin] / self._trials[bin]

    def mean(self) -> float:
        return self._all[0] / self._all[1]
