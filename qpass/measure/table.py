"""The README's result tables, made from Records so that they can't drift from what was measured.

python -m qpass.measure.table RESULTS README.md     RESULTS: a folder of .jsonl files; rewrites the marked parts
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from qpass.measure.record import Record, read
from qpass.measure.report_data import LABELS, machine_of, models
from qpass.measure.report_pictures import recipe_markdown

RESULTS, PEERS, COST, LINEAR, SPECULATION = "results", "peers", "costs", "linear", "speculation"
"""The marked parts: whole models in our variants; beside other engines; before the first token; one linear layer; speculative decoding."""

COSTS = {
    "compile_cold": "compile s, cold",
    "compile_warm": "warm",
    "peak_compile": "peak MB, compiling",
    "rss": "held MB, running",
}

LINEAR_COLUMNS = {
    "w4a8-g128": "`w4a8-g128`",
    "w4a8-g128-intscale": "`w4a8-g128-intscale`",
    "w8a8-dynamic": "`w8a8-dynamic`",
    "w4a16-g128": "`w4a16-g128`",
    "w8a16": "`w8a16`",
    "bf16-onednn": "bf16, oneDNN",
    "int8-onednn": "int8, oneDNN",
    "int4pack-g128": "ATen int4",
    "int8pack": "ATen int8",
}
LINEAR_SHAPE = 8960, 1536  # N, K: the up projection of a 1.5B model
LINEAR_TOKENS = 1, 4, 8, 16, 128, 512


def recipes_markdown(records: Iterable[Record], *, peers: bool = False) -> str:
    """The recipe table of each model, prompt and batch, of runs with other engines (``peers``) or of those without.

    Raises ValueError where there is no such run.
    """
    parts = []
    for model in models(records):
        cases = [case for case in model.cases if case.beside == peers and "run" in case.settings]
        if cases:
            parts.append(recipe_markdown(model, cases))
    if not parts:
        raise ValueError(f"no run {'with' if peers else 'without'} other engines")
    return "\n\n".join(parts)


def costs_markdown(records: Iterable[Record]) -> str:
    """What comes before the first token, a row a variant whose memory was measured too; each in processes of its own.

    Raises ValueError where there is none.
    """
    parts = []
    for model in models(records):
        rows = {name: found for name, found in model.costs.items() if COSTS.keys() <= found.keys()}
        if not rows:
            continue
        commits = ", ".join(dict.fromkeys(r.commit for found in rows.values() for r in found.values()))
        parts += [
            f"{model.name}, {model.machine}, commit {commits}, one process with empty caches and one behind it:\n",
            "| variant | " + " | ".join(COSTS.values()) + " |",
            "|---|" + "---:|" * len(COSTS),
        ]
        for name, found in rows.items():
            label = LABELS.get(name, f"`{name}`")
            parts.append(f"| {label} | " + " | ".join(f"{found[what].value:.0f}" for what in COSTS) + " |")
    if not parts:
        raise ValueError("no record of compile time and memory")
    return "\n".join(parts)


def linear_markdown(records: Iterable[Record]) -> str:
    """A row for each number of tokens: median milliseconds of one linear layer; the last record of each key."""
    n, k = LINEAR_SHAPE
    found = {(r.settings["m"], r.settings["name"]): r for r in records if r.what == "linear" and _shape(r) == (n, k)}
    chosen = {key: r for key, r in found.items() if key[0] in LINEAR_TOKENS and key[1] in LINEAR_COLUMNS}
    if not chosen:
        raise ValueError(f"no record of a linear layer from {k} to {n}")
    one, turns = next(iter(chosen.values())), sorted({r.n for r in chosen.values()})
    parts = [
        f"In milliseconds, {k} inputs to {n} outputs, {one.machine.cpu} ({one.machine.tier}), {one.machine.cores} threads, "
        f"torch {one.machine.torch}, commit {one.commit}, medians of {turns[0]} to {turns[-1]} turns:\n",
        "| tokens | " + " | ".join(LINEAR_COLUMNS.values()) + " |",
        "|---:|" + "---:|" * len(LINEAR_COLUMNS),
    ]
    for m in LINEAR_TOKENS:
        row = (chosen.get((m, name)) for name in LINEAR_COLUMNS)
        parts.append(f"| {m} | " + " | ".join("-" if r is None else _three_digits(r.value) for r in row) + " |")
    return "\n".join(parts)


def _shape(record: Record) -> tuple[int, int]:
    return record.settings["n"], record.settings["k"]


def _three_digits(ms: float) -> str:
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def speculation_markdown(records: Iterable[Record]) -> str:
    """A row a draft: time a token, tokens a step, the bound of its own costs and acceptance; then what verifying costs."""
    records = list(records)
    found = {r.settings["variant"]: r for r in records if r.what == "speculation_tpot"}
    if not found:
        raise ValueError("no record of speculative decoding")
    one, base = next(iter(found.values())), found.get("inductor")
    s = one.settings
    head = f", its head in `{s['draft_head']}`" if s.get("draft_head") else ""
    vocabulary = f" with its first {s['draft_vocabulary']} tokens" if s["draft_vocabulary"] else ""
    parts = [
        f"{s['model']}, draft {s['draft']} in `{s['draft_scheme']}`{head}{vocabulary}, {one.n} "
        f"HumanEval prompts, {s['new']} new tokens, K = {s['k']}, batch 1, greedy, {s['threads']} threads, {one.machine.cpu} "
        f"({one.machine.tier}), torch {one.machine.torch}, commit {one.commit}, prompt after prompt in turns:\n",
        "| target | draft | tokens a step | ms a token | over bf16 | of its bound | the draft's prompt, ms |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, r in found.items():
        scheme, _, draft = name.partition(" ")
        s, own = r.settings, scheme == "inductor"
        ms, read_ms = s["overall_tpot_ms"], s["read_ms"]
        over = "" if base is None else f"{base.settings['overall_tpot_ms'] / ms:.1f}x"
        parts.append(
            f"| {'bf16, stock Inductor' if own else f'`{scheme}`'} | {'-' if own or draft == 'plain' else draft} | "
            f"{s['tokens_a_step']:.2f} | {ms:.1f} | {over} | {s['bound_ms'] / ms:.0%} | {f'{read_ms:.0f}' if read_ms >= 0.5 else '-'} |"
        )
    verified = {(r.settings["scheme"], r.settings["k"]): r for r in records if r.what == "verify"}
    for scheme in dict.fromkeys(key[0] for key in verified):
        costs = [(k, r.value / r.settings["plain_ms"]) for (name, k), r in verified.items() if name == scheme and k]
        parts.append(
            f"\nVerifying K drafted tokens with `{scheme}` over one plain step, at {one_of(verified, scheme).settings['context']} "
            "tokens of context: "
            + ", ".join(f"{cost:.2f} (K = {k})" for k, cost in costs)
            + f". Commit {one_of(verified, scheme).commit}."
        )
    return "\n".join(parts)


def one_of(records: Mapping[tuple[str, int], Record], scheme: str) -> Record:
    return next(record for (name, _), record in records.items() if name == scheme)


def insert(readme: str, table: str, part: str = RESULTS) -> str:
    """The README's text with one marked part replaced. Raises ValueError where its marks are missing."""
    begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.S)
    if not pattern.search(readme):
        raise ValueError(f"no {begin} ... {end}")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", readme)


def of_each_machine(records: Iterable[Record], what: str, markdown: Callable[[list[Record]], str]) -> str:
    """One part of ``markdown`` for each machine that has records of ``what``. Raises ValueError where none has."""
    machines: dict[str, list[Record]] = {}
    for record in records:
        machines.setdefault(machine_of(record), []).append(record)
    parts = [markdown(own) for own in machines.values() if any(r.what == what for r in own)]
    if not parts:
        raise ValueError(f"no record of {what}")
    return "\n\n".join(parts)


def updated(readme: str, folder: Path) -> str:
    """The README's text with every marked part made anew from the ``.jsonl`` files of a folder."""
    records = [record for path in sorted(folder.glob("*.jsonl")) for record in read(path)]
    for part, made in (
        (RESULTS, recipes_markdown(records)),
        (PEERS, recipes_markdown(records, peers=True)),
        (COST, costs_markdown(records)),
        (LINEAR, of_each_machine(records, "linear", linear_markdown)),
        (SPECULATION, of_each_machine(records, "speculation_tpot", speculation_markdown)),
    ):
        readme = insert(readme, made, part)
    return readme


if __name__ == "__main__":
    results, readme = map(Path, sys.argv[1:3])
    readme.write_text(updated(readme.read_text(), results))
