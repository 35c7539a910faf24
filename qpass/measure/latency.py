"""How long until the first token, and how long each one after it: TTFT and TPOT of generations, compared fairly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from qpass.measure.record import Record, quantile


class Timed(Protocol):
    """What a generation must tell; ``qpass.runtime.speculate.Generation`` does."""

    ttft_ms: float
    token_ms: list[float]


@dataclass
class _Seen:
    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)


def measure(
    variants: Mapping[str, Callable[[], Timed]],
    *,
    rounds: int = 3,
    warm_up: int = 1,
    settings: Mapping[str, Any] | None = None,
    limits_ms: Mapping[str, float] | None = None,
) -> list[Record]:
    """TTFT and TPOT of each variant, in turns (A B A B), so that a drift of the machine hits all alike.

    A round's TPOT is the median over its tokens after the first. ``limits_ms`` gives a variant's least possible TPOT.
    Two records a variant, ``ttft`` and ``tpot`` in ms, with the variant's name in their settings.
    """
    seen = {name: _Seen() for name in variants}
    for turn in range(warm_up + rounds):
        for name, generate in variants.items():
            result = generate()
            if turn >= warm_up:
                seen[name].ttft_ms.append(result.ttft_ms)
                if result.token_ms:
                    seen[name].tpot_ms.append(quantile(sorted(result.token_ms), 0.5))
    records = []
    for name, times in seen.items():
        described = {**(settings or {}), "variant": name}
        records.append(Record.of("ttft", times.ttft_ms, "ms", described))
        if times.tpot_ms:
            records.append(Record.of("tpot", times.tpot_ms, "ms", described, limit=(limits_ms or {}).get(name)))
    return records
