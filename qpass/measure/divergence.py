"""How far a quantized model's predictions are from the full-precision model's: KL divergence and top-1 agreement.

A text's perplexity can stay while predictions change; these see every token's whole distribution.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qpass.errors import OptionError
from qpass.measure.perplexity import NORMAL_P90, ROWS, Model, estimate, ratio, scored
from qpass.measure.record import Record, quantile
from qpass.runtime.search import largest


@dataclass
class Divergence:
    """Gathers KL(reference || model) of each token, in nats, and whether the likeliest token is the same."""

    kl: list[list[float]] = field(default_factory=list)  # a window each
    same: list[int] = field(default_factory=list)

    def add(self, reference: Tensor, model: Tensor) -> None:
        """One window's log-probabilities of both, [n, V] each. Raises OptionError for different vocabularies."""
        if reference.shape != model.shape:
            raise OptionError(
                f"the reference's vocabulary has {reference.shape[1]} tokens and the model's {model.shape[1]}; "
                "accepted: models of one vocabulary"
            )
        found: list[float] = []
        same = 0
        for log_p, log_q in zip(reference.split(ROWS), model.split(ROWS), strict=True):
            found += (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).tolist()
            same += int((largest(log_p) == largest(log_q)).sum())
        self.kl.append(found)
        self.same.append(same)

    def records(self, settings: Mapping[str, Any] | None = None) -> list[Record]:
        """``kl`` (its mean), ``kl_p99``, and ``top1_agreement``, a share."""
        counts = [len(window) for window in self.kl]
        tokens = sorted(value for window in self.kl for value in window)
        n, worst = len(tokens), quantile(tokens, 0.99)
        kl, kl_error = ratio([sum(window) for window in self.kl], counts)
        same, same_error = ratio([float(count) for count in self.same], counts)
        between = {name: _order_statistic(tokens, 0.99, sign * NORMAL_P90) for name, sign in (("low", -1), ("high", 1))}
        return [
            estimate("kl", kl, max(0.0, kl - NORMAL_P90 * kl_error), kl + NORMAL_P90 * kl_error, "nats", n, settings),
            estimate("kl_p99", worst, between["low"], between["high"], "nats", n, settings),
            estimate(
                "top1_agreement",
                same,
                max(0.0, same - NORMAL_P90 * same_error),
                min(1.0, same + NORMAL_P90 * same_error),
                "share",
                n,
                settings,
            ),
        ]


def divergence(
    reference: Model,
    model: Model,
    ids: Tensor,
    *,
    length: int = 512,
    stride: int = 256,
    batch: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> list[Record]:
    """KL(reference || model) and top-1 agreement on the text ``ids``, int64 [T]; no more than one batch of logits a model
    is ever held."""
    found = Divergence()
    walk = functools.partial(scored, ids=ids, length=length, stride=stride, batch=batch)
    for (ours, _), (theirs, _) in zip(walk(reference), walk(model), strict=True):
        found.add(ours, theirs)
    return found.records({"length": length, "stride": stride, **(settings or {})})


def _order_statistic(ordered: list[float], q: float, deviations: float) -> float:
    """The bound of a quantile's interval: the value whose rank is so many binomial standard deviations from q's."""
    n = len(ordered)
    rank = (n - 1) * q + deviations * (n * q * (1 - q)) ** 0.5
    return ordered[min(max(round(rank), 0), n - 1)]
