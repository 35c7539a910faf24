"""Fit the performance model's measured constants to a recorded grid, and print them for kernels/plan.py.

    python benchmarks/roofline.py -o NAME.jsonl && python benchmarks/roofline.py --paths -o NAME.jsonl
    python benchmarks/fit_plan.py NAME.jsonl

Constants that count instructions stay as counted. Coordinate descent on the mean |log(predicted / measured)|, to which
every pair of paths in the wrong order adds one error of tests/kernels/test_model.py's size.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from dataclasses import fields, replace
from pathlib import Path
from typing import cast

from qpass.cpu import Cpu, Rates, Tier
from qpass.kernels import plan
from qpass.kernels.plan import Shape
from qpass.measure.linear import format_of, newest
from qpass.measure.record import Record, read
from qpass.scheme import Scheme

AT_MOST = {"dot_efficiency": 1.0, "linear_read": 1.0, "stream_read": 1.0, "overlap": 8.0, "tile_efficiency": 1.0}
AT_LEAST = {"overlap": 1.0}
STEPS = (1.2, 1.05, 1.01)
SPREAD, DIFFERS = 1.3, 1.15  # as in tests/kernels/test_model.py


def predicted(record: Record) -> float:
    """Milliseconds, with the machine's rates of the record."""
    s = record.settings
    format, tier = format_of(Scheme.parse(s["name"])), cast(Tier, record.machine.tier)
    l2_bytes = (2 if tier == "amx" else 1) << 20
    rates = Rates(**s["rates"])
    amd = "AMD" in record.machine.cpu  # all of whose records are Zen 4's
    vendor, isa = ("AuthenticAMD", frozenset({"avx512_bf16"})) if amd else ("GenuineIntel", frozenset())
    cpu = Cpu(record.machine.cpu, vendor, isa, record.machine.cores, l2_bytes=l2_bytes, rates=rates)
    return 1e3 * plan.predict(Shape(s["m"], s["n"], s["k"]), format, cpu, s["path"], tier).seconds


def loss(records: list[Record]) -> float:
    times = [predicted(r) for r in records]
    errors = [abs(math.log(t / r.value)) for t, r in zip(times, records, strict=True)]
    cases: dict[tuple, list[tuple[Record, float]]] = {}
    for record, time in zip(records, times, strict=True):
        s = record.settings
        if record.what == "linear-path":
            cases.setdefault((s["name"], s["n"], s["k"], s["m"]), []).append((record, time))
    wrong = sum(
        (time_a < time_b) != (a.p10 < b.p10)
        for pairs in cases.values()
        for (a, time_a), (b, time_b) in itertools.combinations(pairs, 2)
        if max(a.p10, b.p10) > DIFFERS * min(a.p10, b.p10)
    )
    return statistics.fmean(errors) + wrong * DIFFERS / len(records)


def fit(records: list[Record], name: str) -> float:
    """Improve the core ``plan.<name>``; the mean error then."""
    best = loss(records)
    for step in STEPS:
        improved = True
        while improved:
            improved = False
            for field, factor in itertools.product([f.name for f in fields(plan.Core)], (step, 1 / step)):
                before = getattr(plan, name)
                value = getattr(before, field) * factor
                value = max(AT_LEAST.get(field, 0.0), min(value, AT_MOST.get(field, math.inf)))
                setattr(plan, name, replace(before, **{field: value}))
                found = loss(records)
                if found < best - 1e-6:
                    best, improved = found, True
                else:
                    setattr(plan, name, before)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+")
    records = [r for file in parser.parse_args().records for r in newest(read(file))]
    records = [r for r in records if "path" in r.settings and r.p90 < SPREAD * r.p10]
    name = "XEON_AMX" if records[0].machine.tier == "amx" else "ZEN4"
    print(f"{len(records)} records, mean error {loss(records):.3f} before, {fit(records, name):.3f} after")
    print(name, "=", getattr(plan, name))
    errors = sorted(records, key=lambda r: abs(math.log(predicted(r) / r.value)))
    for r in errors[-12:]:
        s = r.settings
        print(f"{s['name']} {s['k']} -> {s['n']} M={s['m']} {s['path']}: {r.value:.3f} ms, model {predicted(r):.3f}")


if __name__ == "__main__":
    main()
