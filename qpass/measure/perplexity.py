"""How well a model predicts a text: perplexity over token ids, with a sliding window.

Every window has the same length, so a compiled model sees one shape. Each token but the first is scored once, and all
behind the first window with at least ``length - stride`` tokens of context.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qpass.errors import OptionError
from qpass.measure.record import Machine, Record, commit

Model = Callable[[Tensor], Any]
"""Token ids int64 [B, L] to logits [B, L, V], or to an object with such ``logits``."""

ROWS = 64
"""Rows of a vocabulary worked on at a time: with 152k tokens 40 MB."""

NORMAL_P90 = 1.2815515655446004
"""The normal distribution's 90% quantile."""


@dataclass(frozen=True)
class Window:
    """Tokens [begin, begin + length); those from ``first`` on are scored here."""

    begin: int
    first: int


def windows(total: int, length: int, stride: int) -> tuple[int, list[Window]]:
    """The windows' common length, and where they lie; the last is moved back so that it ends with the text.

    Raises OptionError for a text without two tokens, or a stride outside of 1..length-1.
    """
    if total < 2:
        raise OptionError(f"the text has {total} tokens; accepted: 2 or more")
    if not 1 <= stride < length:
        raise OptionError(f"stride is {stride}; accepted: 1 to {length - 1}, one below the window's {length} tokens")
    if total <= length:
        return total, [Window(0, 1)]
    found = [Window(0, 1)]
    while (end := found[-1].begin + length) < total:
        found.append(Window(min(end + stride, total) - length, end))
    return length, found


def scored(
    model: Model,
    ids: Tensor,
    *,
    length: int,
    stride: int,
    batch: int = 1,
    on_batch: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pair a window: the log-probabilities, fp32 [n, V], at its scored tokens, and the tokens int64 [n].

    ``batch`` windows go through the model at once; the last batch is filled up, so there is one shape.
    ``on_batch`` hears how many windows of how many are done.
    """
    if batch < 1:
        raise OptionError(f"batch is {batch}; accepted: 1 or more")
    ids = ids.flatten()
    length, places = windows(len(ids), length, stride)
    batch = min(batch, len(places))
    for at in range(0, len(places), batch):
        chosen = places[at : at + batch]
        filled = chosen + [chosen[-1]] * (batch - len(chosen))
        with torch.no_grad():
            out = model(torch.stack([ids[w.begin : w.begin + length] for w in filled]))
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        if logits.shape[:2] != (batch, length):
            raise OptionError(f"the model gave logits {tuple(logits.shape)}; expected [{batch}, {length}, vocabulary]")
        for row, window in zip(logits, chosen, strict=False):
            rows = row[window.first - 1 - window.begin : -1]
            yield _log_probabilities(rows), ids[window.first : window.begin + length]
        if on_batch is not None:
            on_batch(min(at + batch, len(places)), len(places))


def _log_probabilities(logits: Tensor) -> Tensor:
    """[n, V] in any dtype to fp32 [n, V]; no second copy of the whole in between."""
    found = torch.empty(logits.shape, dtype=torch.float32)
    for part, rows in zip(found.split(ROWS), logits.split(ROWS), strict=True):
        torch.log_softmax(rows.float(), -1, out=part)
    return found


@dataclass
class Perplexity:
    """Gathers negative log-likelihoods window by window."""

    nll: list[float] = field(default_factory=list)  # the sum of each window, in nats
    tokens: list[int] = field(default_factory=list)

    def add(self, log_probs: Tensor, targets: Tensor) -> None:
        """One window: log-probabilities [n, V], targets int64 [n]. Raises ValueError for logits, of which some are above 0."""
        if log_probs.numel() and float(log_probs.max()) > 1e-3:  # rounding leaves a certain token a little above
            raise ValueError("log-probabilities are at most 0; these are logits")
        self.nll.append(-log_probs.gather(1, targets[:, None]).double().sum().item())
        self.tokens.append(len(targets))

    @property
    def value(self) -> float:
        """exp(mean negative log-likelihood of a token)."""
        return math.exp(sum(self.nll) / sum(self.tokens))

    def records(self, settings: Mapping[str, Any] | None = None) -> list[Record]:
        mean, error = ratio(self.nll, self.tokens)
        low, high = (math.exp(mean + sign * NORMAL_P90 * error) for sign in (-1, 1))
        return [estimate("perplexity", math.exp(mean), low, high, "perplexity", sum(self.tokens), settings)]


def perplexity(
    model: Model,
    ids: Tensor,
    *,
    length: int = 512,
    stride: int = 256,
    batch: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> list[Record]:
    """The perplexity of ``model`` on the text ``ids``, int64 [T]: one record, n = scored tokens."""
    found = Perplexity()
    for log_probs, targets in scored(model, ids, length=length, stride=stride, batch=batch):
        found.add(log_probs, targets)
    return found.records({"length": length, "stride": stride, **(settings or {})})


def ratio(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """The mean of a token, and its standard error: windows are the independent draws, tokens of one are not.

    The ratio estimator's linearized variance; 0 for a single window, of which nothing is known.
    """
    total = sum(counts)
    mean = sum(sums) / total
    if len(sums) < 2:
        return mean, 0.0
    residuals = [s - mean * n for s, n in zip(sums, counts, strict=True)]
    return mean, math.sqrt(len(sums) * statistics.variance(residuals)) / total


def estimate(
    what: str, value: float, p10: float, p90: float, unit: str, n: int, settings: Mapping[str, Any] | None
) -> Record:
    """A record of a quality: one estimate from n tokens or problems, p10 and p90 the bounds of its 80% interval."""
    return Record(
        what, value, unit, n, p10, p90, Machine.here(), commit(), {"spread": "80% interval", **(settings or {})}
    )
