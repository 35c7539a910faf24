"""Bench Records as tables for the terminal: one a model, prompt and batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from qpass.measure.record import Record

BASELINES = ("stock", "stock-frozen", "inductor", "bf16")
"""What a variant's speed-up is over: the first of these that is there."""
COSTS = {
    "load": "load s",
    "compile_cold": "compile s, cold",
    "compile_warm": "warm",
    "peak_load": "peak MB, load",
    "peak_compile": "compile",
    "peak_run": "run",
    "rss": "held MB",
}


def table(records: Sequence[Record]) -> Iterator[Table | str]:
    """Tables, and lines of text behind them: what disturbed the run, what a verification costs."""
    yield from _speeds(records)
    costs = [r for r in records if r.what in COSTS]
    if costs:
        found = Table(title="before the first token", title_justify="left")
        columns = [what for what in COSTS if any(r.what == what for r in costs)]
        for name in ("variant", *(COSTS[what] for what in columns)):
            found.add_column(name, justify="left" if name == "variant" else "right")
        for variant in dict.fromkeys(r.settings["variant"] for r in costs):
            mine = {r.what: r for r in costs if r.settings["variant"] == variant}
            found.add_row(escape(variant), *(f"{mine[what].value:.4g}" if what in mine else "-" for what in columns))
        yield found
    for scheme in dict.fromkeys(r.settings["scheme"] for r in records if r.what == "verify"):
        mine_ = [r for r in records if r.what == "verify" and r.settings["scheme"] == scheme]
        cost = ", ".join(
            f"K={r.settings['k']} {r.value / r.settings['plain_ms']:.2f}" for r in mine_ if r.settings["k"]
        )
        yield escape(
            f"{scheme}: checking K tokens over a plain step of {mine_[0].settings['plain_ms']:.1f} ms at "
            f"{mine_[0].settings['context']} tokens of context: {cost}"
        )


def _speeds(records: Sequence[Record]) -> Iterator[Table | str]:
    timed = [r for r in records if r.what in ("ttft", "tpot", "throughput")]
    cases = dict.fromkeys((r.settings["model"], r.settings["prompt"], r.settings.get("batch", 1)) for r in timed)
    for model, prompt, batch in cases:
        mine: dict[str, dict[str, Record]] = {}
        for r in timed:
            if (r.settings["model"], r.settings["prompt"], r.settings.get("batch", 1)) == (model, prompt, batch):
                mine.setdefault(r.settings["variant"], {})[r.what] = r
        baseline = next((mine[name] for name in BASELINES if name in mine), {})
        one = next(iter(next(iter(mine.values())).values()))
        s, machine = one.settings, one.machine
        drafts = any("tokens_a_step" in r.settings for r in timed)
        found = Table(
            title=escape(
                f"{model}, {prompt}-token prompt, batch {batch}, {s['new']} new tokens, n = {one.n} in turns; {machine.cpu} "
                f"({machine.tier}), {s['threads']} threads, {s['bandwidth_gbps']:.1f} GB/s read"
            ),
            title_justify="left",
        )
        found.add_column("variant", no_wrap=True)
        titles = ["TTFT ms", "p10..p90", "over", "of peak", "TPOT ms", "p10..p90", "over", "of limit", "tokens/s"]
        for title in titles + ["a step", "accepted"] * drafts:
            found.add_column(title, justify="right", no_wrap=True)
        for variant, row in mine.items():
            cells = [*_time(row.get("ttft"), baseline.get("ttft")), *_time(row.get("tpot"), baseline.get("tpot"))]
            cells.append(_number(row.get("throughput")))
            if drafts:
                settings: Any = row["ttft"].settings
                cells += (
                    [f"{settings['tokens_a_step']:.2f}", f"{settings['acceptance']:.0%}"]
                    if ("tokens_a_step" in settings)
                    else ["-", "-"]
                )
            found.add_row(escape(variant), *cells)
        yield found
        yield from _doubts(mine)


def _doubts(rows: dict[str, dict[str, Record]]) -> Iterator[str]:
    sentences: dict[str, list[str]] = {}
    for variant, row in rows.items():
        for record in row.values():
            for sentence in record.settings.get("disturbed", ()):
                if record.what != "throughput" or not sentence.startswith("throughput"):
                    sentences.setdefault(sentence, []).append(variant)
    for sentence, variants in sentences.items():
        every = len(set(variants)) == len(rows)
        yield "disturbed: " + escape(sentence if every else f"{', '.join(dict.fromkeys(variants))}: {sentence}")


def _time(record: Record | None, baseline: Record | None) -> list[str]:
    if record is None:
        return ["-"] * 4
    over = "-" if baseline is None else f"{baseline.value / record.value:.2f}x"
    share = "-" if record.share_of_limit is None else f"{record.share_of_limit:.0%}"
    return [_number(record), f"{_short(record.p10)}..{_short(record.p90)}", over, share]


def _number(record: Record | None) -> str:
    return "-" if record is None else _short(record.value)


def _short(value: float) -> str:
    """Three digits, never fewer than what stands before the point."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
