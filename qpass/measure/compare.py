"""What changed between two sets of Records: ratios to a baseline row inside each set, and whether they left the noise.

Absolute times of a machine drift from day to day; what one variant takes over another, measured in turns, drifts far
less. So a time is compared as its ratio to the baseline's time of the same set where both sets have one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qpass.measure.record import Record

BASELINES = ("stock", "stock-frozen", "inductor", "bf16", "bf16-onednn", "w16a16")
"""Rows that a set's other rows are held against: the first of these that both sets have."""

IDENTITY = (
    *(
        "model",
        "draft",
        "draft_scheme",
        "draft_vocabulary",
        "scheme",
        "variant",
        "name",
        "path",
        "task",
        "text",
        "source",
    ),
    *("n", "k", "m", "prompt", "batch", "new", "context", "threads", "stride", "length", "count", "kv"),
    *("exclude", "lowering", "stats", "alpha", "recipe", "chat", "problems", "algorithm", "cell"),
)
"""The settings that say what was measured; the others say how it went."""

HIGHER = ("throughput", "acceptance", "agreement", "pass", "humaneval", "top1", "accuracy")
"""What is better when it is more; everything else (times, bytes, perplexity, divergence) is better when it is less."""
RELATIVE = ("ms", "s", "us", "tokens/s")
"""Units that depend on the machine's mood, so that a ratio says more."""
WITHOUT = ("trace", "absent")

Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Change:
    """``factor`` is new over old, of ratios to ``over`` where that is given; above 1 is worse if ``less_is_better``.

    The ends of ``old`` and ``new`` are p10 and p90, those of a ratio its least and most by both rows' ends.
    """

    what: str
    settings: Mapping[str, str]
    unit: str
    over: str | None
    less_is_better: bool
    old: tuple[float, float, float]  # p10, median, p90
    new: tuple[float, float, float]

    @property
    def factor(self) -> float:
        return self.new[1] / self.old[1] if self.old[1] else float("inf") if self.new[1] else 1.0

    def verdict(self, tolerance: float) -> str:
        """ "worse" or "better" where the two spreads don't touch and the medians differ by more than ``tolerance``;
        else "same"."""
        up = self.new[0] > self.old[2] and self.factor > 1 + tolerance
        down = self.new[2] < self.old[0] and self.factor < 1 / (1 + tolerance)
        if not up and not down:
            return "same"
        return "worse" if up == self.less_is_better else "better"


def compare(old: Iterable[Record], new: Iterable[Record]) -> list[Change]:
    """One change for each thing that both sets measured, in the order of ``new``; of several records the last counts."""
    before, after = latest(old), latest(new)
    changes = []
    for key, record in after.items():
        if key not in before:
            continue
        row = dict(key[1])
        field = "variant" if "variant" in row else "name"
        over = _baseline(key, field, before, after) if record.unit in RELATIVE else None
        if over == key:
            continue  # it is the measure itself
        ends = [_ends(found[key], found[over] if over else None) for found in (before, after)]
        name = dict(over[1])[field] if over else None
        less = not any(word in record.what for word in HIGHER)
        changes.append(Change(record.what, row, record.unit, name, less, *ends))
    return changes


def only_in(one: Iterable[Record], other: Iterable[Record]) -> list[str]:
    """What ``one`` measured and ``other`` didn't, as text."""
    known = latest(other)
    return [describe(key[0], dict(key[1])) for key in latest(one) if key not in known]


def describe(what: str, settings: Mapping[str, str]) -> str:
    """A row in words: "tpot w4a8-g128 (model m, prompt 128)"."""
    rest = ", ".join(f"{name} {value}" for name, value in settings.items() if name not in ("variant", "threads"))
    return f"{what} {settings.get('variant', '')}".rstrip() + (f" ({rest})" if rest else "")


def latest(records: Iterable[Record]) -> dict[Key, Record]:
    """The last record of each thing that was measured."""
    found: dict[Key, Record] = {}
    for r in records:
        if r.what in WITHOUT:
            continue
        pairs = tuple((name, str(r.settings[name])) for name in IDENTITY if r.settings.get(name) is not None)
        found[r.what, pairs] = r
    return found


def _baseline(key: Key, field: str, before: Mapping[Key, Record], after: Mapping[Key, Record]) -> Key | None:
    """The row of the same case that both sets have. A draft's row is held against one without."""
    case = tuple(pair for pair in key[1] if not pair[0].startswith("draft") and not (pair[0] == "k" and _drafted(key)))
    for name in BASELINES:
        found = key[0], tuple((one, name if one == field else value) for one, value in case)
        if found in before and found in after:
            return found
    return None


def _drafted(key: Key) -> bool:
    return any(name == "draft" for name, _ in key[1])


def _ends(record: Record, over: Record | None) -> tuple[float, float, float]:
    low, middle, high = record.p10, record.value, record.p90
    if over is None:
        return low, middle, high
    divisors: Sequence[float] = over.p90, over.value, over.p10
    return tuple(a / b if b else float("inf") for a, b in zip((low, middle, high), divisors, strict=True))  # type: ignore[return-value]
