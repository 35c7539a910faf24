"""What the report shows, picked from Records: cases with their variants, quality, curves, the machines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qpass.measure.compare import latest
from qpass.measure.record import Record

BASELINE = "stock"
LABELS = {BASELINE: "bf16, stock Inductor", "stock-frozen": "bf16, Inductor with frozen weights"}
ALIASES = {"inductor": BASELINE, "bf16": BASELINE}  # as older records and those of quality call it
QUALITY = ("perplexity", "kl", "top1_agreement", "humaneval", "pass@1")
PASS = ("humaneval", "pass@1", "humaneval_pass@1", "humaneval_pass_at_1")
COSTS = ("load", "compile_cold", "compile_warm", "peak_load", "peak_compile", "peak_run", "rss")
TIMES = ("ttft", "tpot", "throughput")


@dataclass
class Row:
    """One variant of a case; ``over`` is the baseline's row, itself for the baseline."""

    variant: str
    records: dict[str, Record] = field(default_factory=dict)
    over: Row | None = None

    @property
    def label(self) -> str:
        return LABELS.get(self.variant, self.variant)

    @property
    def peer(self) -> bool:
        """Somebody else's engine."""
        return any(r.settings.get("peer") for r in self.records.values())

    @property
    def scheme(self) -> str:
        """The variant without its draft, whose text is the same: quality is its."""
        return self.variant.partition(" + ")[0]

    def speed_up(self, what: str) -> float | None:
        mine, theirs = self.records.get(what), self.over.records.get(what) if self.over else None
        return theirs.value / mine.value if mine and theirs and mine.value else None

    @property
    def megabytes(self) -> float | None:
        """Read by a token's step; None where it isn't known."""
        speed = self.records.get("tpot")
        found = speed.settings.get("read_bytes") if speed else None
        return found / 1e6 if found else None


@dataclass(frozen=True)
class Case:
    """Variants of one model, prompt and batch on one machine, measured in one run; ``beside``: with other engines."""

    prompt: int
    batch: int
    rows: tuple[Row, ...]
    beside: bool = False

    @property
    def settings(self) -> dict:
        return dict(next(iter(self.rows[0].records.values())).settings)


@dataclass
class Model:
    """Everything about one model on one machine."""

    name: str
    machine: str
    cases: list[Case] = field(default_factory=list)
    quality: dict[str, dict[str, Record]] = field(default_factory=dict)  # by scheme, by what
    costs: dict[str, dict[str, Record]] = field(default_factory=dict)  # by variant, by what
    verify: dict[str, list[Record]] = field(default_factory=dict)  # by scheme, by k
    profiles: list[Record] = field(default_factory=list)
    traces: list[Record] = field(default_factory=list)
    absent: list[Record] = field(default_factory=list)

    def passed(self, scheme: str) -> Record | None:
        mine = self.quality.get(scheme, {})
        return next((mine[what] for what in PASS if what in mine), None)


def machine_of(record: Record) -> str:
    return f"{processor_of(record)}, {record.machine.cores} cores"


def processor_of(record: Record) -> str:
    """What quality may depend on: how many cores there were changes no result."""
    return f"{record.machine.cpu} ({record.machine.tier})"


def variant_of(record: Record) -> str:
    """As ``qpass bench`` names it, where a record of quality has a scheme and the statistics that smoothed it."""
    s = record.settings
    scheme, algorithm = str(s.get("scheme") or ""), s.get("algorithm")
    if algorithm not in (None, "none", "rtn"):
        scheme = f"{scheme} {algorithm}"
    name = str(s.get("variant") or (f"{scheme} (smoothed)" if s.get("stats") and "a8" in scheme else scheme))
    return ALIASES.get(name, name)


Place = tuple[str, str, int, int, bool]
"""Model, machine, prompt, batch, and whether the run had other engines."""


def newest_runs(records: Iterable[Record]) -> dict[Place, list[Record]]:
    """The times of the newest run of each place: only what was measured in turns compares."""
    times = [r for r in records if r.what in TIMES and isinstance(r.settings.get("prompt"), int)]
    beside = {_run(r) for r in times if r.settings.get("peer")}
    found: dict[Place, dict[str, list[Record]]] = {}
    for r in times:
        s = r.settings
        place = str(s.get("model")), machine_of(r), s["prompt"], int(s.get("batch", 1)), _run(r) in beside
        found.setdefault(place, {}).setdefault(_run(r), []).append(r)
    ordered = sorted(found.items(), key=lambda item: (item[0][4], item[0][2:]))
    return {place: list(latest(runs[max(runs)]).values()) for place, runs in ordered}


def _run(record: Record) -> str:
    return str(record.settings.get("run", ""))


def models(records: Iterable[Record]) -> list[Model]:
    """By model and machine, in the order in which they come; times of the newest runs, of all else the last record."""
    records = list(records)
    found: dict[tuple[str, str], Model] = {}
    quality: dict[tuple[str, str], dict[str, dict[str, Record]]] = {}
    chosen = [*latest(records).values(), *(r for r in records if r.what in ("trace", "absent"))]
    for r in chosen:
        name = r.settings.get("model")
        if not isinstance(name, str):
            continue
        variant = variant_of(r)
        if r.what in QUALITY or r.what in PASS:
            quality.setdefault((name, processor_of(r)), {}).setdefault(variant, {})[r.what] = r
            continue
        key = name, machine_of(r)
        model = found.setdefault(key, Model(*key))
        if r.what in COSTS:
            model.costs.setdefault(variant, {})[r.what] = r
        elif r.what == "verify":
            model.verify.setdefault(variant, []).append(r)
        elif r.what == "profile":
            model.profiles.append(r)
        elif r.what == "trace":
            model.traces = [t for t in model.traces if t.settings.get("variant") != variant] + [r]
        elif r.what == "absent":
            model.absent = [a for a in model.absent if a.settings.get("variant") != variant] + [r]
    for (name, machine, prompt, batch, beside), times in newest_runs(records).items():
        rows: dict[str, Row] = {}
        for r in times:
            variant = variant_of(r)
            rows.setdefault(variant, Row(variant)).records[r.what] = r
        if (name, machine) in found:
            found[name, machine].cases.append(Case(prompt, batch, _ordered(list(rows.values())), beside))
    for (name, processor), judged in quality.items():
        same = [m for m in found.values() if m.name == name and m.machine.rpartition(", ")[0] == processor]
        if not same:
            machine = machine_of(next(iter(next(iter(judged.values())).values())))
            same = [found.setdefault((name, machine), Model(name, machine))]
        for model in same:
            model.quality = judged
    for model in found.values():
        for runs in model.verify.values():
            runs.sort(key=lambda r: r.settings["k"])
    return [m for m in found.values() if m.cases or m.quality or m.verify or m.profiles or m.traces or m.costs]


def _ordered(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The baseline (the first of LABELS that is there) first, ours as they were given, peers last."""
    base = next((row for name in LABELS for row in rows if row.variant == name), None)
    for row in rows:
        row.over = base
    return tuple(sorted(rows, key=lambda row: (row is not base, row.peer)))


def linears(records: Iterable[Record]) -> dict[tuple[str, int, int], dict[str, list[Record]]]:
    """Records of one linear layer, by (machine, N, K), by candidate, in the order of M."""
    found: dict[tuple[str, int, int], dict[str, list[Record]]] = {}
    for r in latest(r for r in records if r.what == "linear" and "rates" in r.settings).values():
        s = r.settings
        found.setdefault((machine_of(r), s["n"], s["k"]), {}).setdefault(s["name"], []).append(r)
    for names in found.values():
        for points in names.values():
            points.sort(key=lambda r: r.settings["m"])
    return found


def linear_shares(record: Record) -> tuple[float, float]:
    """Of the read bandwidth, and of the peak of the dot products that the candidate uses."""
    s, seconds, rates = record.settings, record.value / 1e3, record.settings["rates"]
    kind = "int8" if "a8-" in s["name"] or s["name"] == "int8-onednn" else "bf16"
    peak = max(rates[f"{kind}_macs"], rates[f"{kind}_tile_macs"])
    if "a16" in s["name"]:
        peak = max(peak, rates["int8_macs"] / 2)  # two int8 terms, where bf16 is slow
    return s["weight_bytes"] / seconds / rates["read_bytes"], s["m"] * s["n"] * s["k"] / seconds / peak
