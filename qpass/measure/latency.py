"""How long until the first token, and how long each one after it: TTFT and TPOT of generations, compared fairly.

TTFT runs from the call to the first token. TPOT is the time from the first token to the last over the tokens between
them, the usual definition: what a draft or a graph break costs is in it, wherever in the text it falls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from qpass.measure.record import Record

T = TypeVar("T")


class Timed(Protocol):
    """What a generation must tell; ``qpass.runtime.speculate.Generation`` does."""

    ttft_ms: float
    token_ms: list[float]  # each token after the first


def turns(
    variants: Mapping[str, Callable[[], T]],
    *,
    rounds: int,
    warm_up: int = 1,
    between: Callable[[str], None] | None = None,
) -> dict[str, list[T]]:
    """What each variant returned in each round, the variants taking turns (A B A B), the first ``warm_up`` rounds left out.

    A drift of the machine then hits all alike. ``between(name)`` is called before each turn that counts, and with ""
    behind the last.
    """
    seen: dict[str, list[T]] = {name: [] for name in variants}
    for turn in range(warm_up + rounds):
        for name, generate in variants.items():
            if turn < warm_up:
                generate()
                continue
            if between is not None:
                between(name)
            seen[name].append(generate())
    if between is not None:
        between("")
    return seen


def measure(
    variants: Mapping[str, Callable[[], Timed]],
    *,
    rounds: int = 3,
    warm_up: int = 1,
    settings: Mapping[str, Any] | None = None,
    limits_ms: Mapping[str, float] | None = None,
) -> list[Record]:
    """TTFT and TPOT of each variant, in turns. ``limits_ms`` gives a variant's least possible TPOT.

    Two records a variant, ``ttft`` and ``tpot`` in ms, with the variant's name in their settings.
    """
    records = []
    for name, results in turns(variants, rounds=rounds, warm_up=warm_up).items():
        described = {**(settings or {}), "variant": name}
        tpot_ms = [sum(each.token_ms) / len(each.token_ms) for each in results if each.token_ms]
        records.append(Record.of("ttft", [each.ttft_ms for each in results], "ms", described))
        if tpot_ms:
            records.append(Record.of("tpot", tpot_ms, "ms", described, limit=(limits_ms or {}).get(name)))
    return records
