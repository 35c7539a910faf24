"""Calibrated: what the passes may ask of a calibration: how to smooth an input, its static scale, and who can't bear one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from qpass.algorithms.observe import Observer
from qpass.algorithms.smoothing import Smoothed, smooth
from qpass.errors import OptionError
from qpass.scheme import Scheme

STATIC_ERROR = 0.0018
"""A static scale may be given up where it costs more than this share of a layer's output (squared), and a scale a token half of it."""

UNBEARABLE = 0.02
"""A static scale is given up in any case where a scale a token saves more than this."""

MOST_GIVEN_UP = 0.1
"""Of the linears that were to be static, the others among these included: those that win most by it."""

BEARABLE = Scheme.parse("w8a8-dynamic")
"""What a layer gets that can't bear a static scale, unless its weights have another format."""


@dataclass(frozen=True)
class Decision:
    """For one input: its smoothing, and the schemes of the linears that read it, which may be others than were asked for."""

    smoothed: Smoothed
    schemes: tuple[Scheme, ...]
    notes: tuple[str, ...] = ()
    static: Decision | None = None  # what this one takes the place of
    gain: float = 0.0  # and the share of the output that it saves


@dataclass
class Calibrated:
    """``observer_of`` finds what a linear read; ``alpha_of`` says how to smooth it. Decisions are kept: weights may go."""

    observer_of: Callable[[str], Observer | None]
    alpha_of: Callable[[str], float | str | None]
    decided: dict[tuple, Decision] = field(default_factory=dict)

    def seen(self, name: str, scheme: Scheme) -> Observer:
        """What the linear read. Raises OptionError where calibration didn't see it."""
        observer = self.observer_of(name)
        if observer is None:
            raise OptionError(f"{name}: calibration saw no such linear, and scheme {scheme} needs it to")
        return observer

    def decide(
        self,
        names: Sequence[str],
        schemes: Sequence[Scheme],
        weights: Callable[[], list[Tensor]],
        *,
        smoothable: bool = True,
        divisor: Tensor | None = None,
    ) -> Decision | None:
        """For the linears ``names``, which read one input. ``weights`` reads them, [N_i, K] each, unless this was decided.

        ``divisor`` is what codes that are there already want; then the weights are theirs, and nothing else is divided.
        None where calibration didn't see the linears and no scheme needs it to. Raises OptionError where one does.
        """
        key = (tuple(names), tuple(schemes), smoothable, divisor is None)
        if key not in self.decided:
            observer = self.observer_of(names[0])
            if observer is None:
                for name, scheme in zip(names, schemes, strict=True):
                    if scheme.needs_statistics:
                        self.seen(name, scheme)
                return None
            self.decided[key] = self._decide(names[0], observer, tuple(schemes), weights(), smoothable, divisor)
        return self.decided[key]

    def _decide(
        self,
        name: str,
        observer: Observer,
        schemes: tuple[Scheme, ...],
        weights: list[Tensor],
        smoothable: bool,
        divisor: Tensor | None,
    ) -> Decision:
        alpha = self.alpha_of(name) if smoothable and divisor is None else None
        for weight in weights:
            if weight.shape[1] != observer.k:
                raise OptionError(
                    f"the statistics are of another model: {name} has {weight.shape[1]} inputs, they know {observer.k}"
                )
        found = smooth(observer, weights, schemes, alpha, given=divisor)
        static = [scheme for scheme in schemes if scheme.activation == "a8-static"]
        cost = found.error.of(True)
        if not static or cost <= STATIC_ERROR:
            return Decision(found, schemes)
        others = tuple(bearable(scheme) for scheme in schemes)
        better = smooth(observer, weights, others, alpha, given=divisor)
        if better.error.of(True) > cost / 2:
            return Decision(found, schemes)
        note = f"{static[0]}: one static scale would cost {cost:.1%} of its output, one a token {better.error.of(True):.2%}"
        return Decision(better, others, (note,), Decision(found, schemes), cost - better.error.of(True))


def most_static(decisions: Sequence[Decision | None]) -> list[Decision | None]:
    """The decisions of one graph: beyond a tenth of the linears that should be static, the bearable ones are."""
    wanted = sum(
        scheme.activation == "a8-static"
        for decision in decisions
        if decision is not None
        for scheme in (decision.static or decision).schemes
    )
    left, allowed = int(MOST_GIVEN_UP * wanted), set()
    for decision in sorted((d for d in decisions if d is not None and d.static is not None), key=lambda d: -d.gain):
        left -= len(decision.schemes)
        if left < 0 and decision.gain <= UNBEARABLE:
            break
        allowed.add(id(decision))
    return [d if d is None or d.static is None or id(d) in allowed else d.static for d in decisions]


def bearable(scheme: Scheme) -> Scheme:
    """The same with a scale a token, where it is static."""
    if scheme.activation != "a8-static" or scheme.weight is None:
        return scheme
    if scheme.weight == BEARABLE.weight:
        return BEARABLE
    return Scheme.of(scheme.weight, scheme.weight.token_rule)
