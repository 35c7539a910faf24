"""The performance model against what was measured: the recorded grid has the machine's rates beside every time."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qpass.cpu import Cpu, Rates
from qpass.kernels.plan import Plan, Shape, predict
from qpass.measure.linear import format_of, newest
from qpass.measure.record import Record, read
from qpass.scheme import Scheme

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SPREAD = 1.3  # p90 over p10: a time that varies more is the machine's unrest, not the kernel's
WITHIN = 0.25
DIFFERS = 1.15

KNOWN = {
    "avx512_vnni": Cpu("recorded", "AuthenticAMD", frozenset({"avx512_bf16"}), 2),
    "amx": Cpu("recorded", "x", frozenset(), 2, l2_bytes=2 << 20),
}


def recorded(what: str) -> Iterator[tuple[Record, Plan]]:
    for file in sorted(RESULTS.glob("*.jsonl")):
        for record in newest(read(file)):
            s = record.settings
            if record.what != what or "path" not in s or record.machine.tier not in KNOWN:
                continue
            cpu = replace(KNOWN[record.machine.tier], cores=record.machine.cores, rates=Rates(**s["rates"]))
            shape, format = Shape(s["m"], s["n"], s["k"]), format_of(Scheme.parse(s["name"]))
            yield record, predict(shape, format, cpu, s["path"], record.machine.tier)


def test_predictions_are_within_a_quarter() -> None:
    points = [(r, p) for r, p in recorded("linear") if r.p90 < SPREAD * r.p10]
    assert len(points) > 100  # schemes x shapes x M
    errors = [abs(1e3 * p.seconds / r.value - 1) for r, p in points]
    assert statistics.median(errors) < 0.12
    off = [
        f"{r.settings['name']} {r.settings['n']} M={r.settings['m']}: {r.value:.3f} ms, model {1e3 * p.seconds:.3f}"
        for (r, p), e in zip(points, errors, strict=True)
        if e > WITHIN
    ]
    assert len(off) <= 0.1 * len(points), off


def test_the_model_knows_which_path_wins() -> None:
    """Wherever two ways of walking a call differ by more than 15%, the one that it predicts to win does."""
    cases: dict[tuple, list[tuple[Record, Plan]]] = {}
    for record, plan in recorded("linear-path"):
        s = record.settings
        cases.setdefault((record.machine.cpu, s["name"], s["n"], s["k"], s["m"]), []).append((record, plan))
    decided = wrong = 0
    for pairs in cases.values():
        for (a, plan_a), (b, plan_b) in itertools.combinations(pairs, 2):
            fast, slow = sorted((a.p10, b.p10))
            if slow > DIFFERS * fast and max(a.p90 / a.p10, b.p90 / b.p10) < SPREAD:
                decided += 1
                wrong += (plan_a.seconds < plan_b.seconds) != (a.p10 < b.p10)
    assert decided >= 10
    assert wrong == 0


@pytest.mark.parametrize("m", [1, 8, 128, 2048])
def test_the_model_is_sane(m: int) -> None:
    """More rows, more bits and a slower memory never take less time; no prediction beats the limit."""
    cpu = Cpu("x", "y", frozenset(), 2, rates=Rates(30e9, 460e9, 230e9, 14.5e9))
    slow = replace(cpu, rates=Rates(15e9, 230e9, 115e9, 7e9))
    for name in ("w4a16-g128", "w4a8-g128", "w8a16", "w8a8-dynamic", "w3a8-g64", "w2a16-g32"):
        format = format_of(Scheme.parse(name))
        for tier, path in (("avx512_vnni", "stream"), ("avx2", "stream")):
            plan = predict(Shape(m, 2048, 1536), format, cpu, path, tier)
            assert plan.limit_seconds < plan.seconds
            assert plan.seconds < predict(Shape(m, 2048, 1536), format, slow, path, tier).seconds
            assert plan.seconds < predict(Shape(2 * m, 4096, 1536), format, cpu, path, tier).seconds
            assert plan.weight_bytes == format.packed_bytes(2048, 1536)
