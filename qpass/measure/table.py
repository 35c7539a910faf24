"""The README's results table, made from Records so that it can't drift from what was measured.

python -m qpass.measure.table RESULTS README.md     RESULTS: a folder of .jsonl files; rewrites the marked part
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from qpass.measure.record import Record, read

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

COLUMNS = {
    "ttft": "TTFT ms",
    "tpot": "TPOT ms",
    "rss": "memory MB",
    "compile_cold": "compile s, cold",
    "compile_warm": "warm",
}


Key = tuple[tuple[str, int], str, str]
"""(model, prompt's tokens), variant, what. Memory and compile time know no prompt: they go with the shortest."""


def latest(records: Iterable[Record]) -> dict[Key, Record]:
    """The last record of each key."""
    kept = [r for r in records if r.what in COLUMNS]
    shortest: dict[str, int] = {}
    for r in kept:
        model, tokens = r.settings.get("model", ""), r.settings.get("prompt")
        if tokens is not None:
            shortest[model] = min(tokens, shortest.get(model, tokens))
    found: dict[Key, Record] = {}
    for r in kept:
        model = r.settings.get("model", "")
        tokens = r.settings.get("prompt", shortest.get(model, 0))
        found[(model, tokens), r.settings.get("variant", ""), r.what] = r
    return found


def markdown(records: Iterable[Record], baseline: str = "inductor") -> str:
    """One table a model and prompt: a row a variant; times relative to the baseline's in parentheses."""
    found = latest(records)
    parts = []
    for model, tokens in dict.fromkeys(key[0] for key in found):
        mine = {key[1:]: record for key, record in found.items() if key[0] == (model, tokens)}
        columns = {what: title for what, title in COLUMNS.items() if any(key[1] == what for key in mine)}
        parts.append(_heading(model, list(mine.values())))
        parts.append("| variant | " + " | ".join(columns.values()) + " |\n|---|" + "---:|" * len(columns))
        for variant in dict.fromkeys(key[0] for key in mine):
            cells = [_cell(mine.get((variant, what)), mine.get((baseline, what)), what) for what in columns]
            parts.append(
                f"| {'bf16, stock Inductor' if variant == baseline else f'`{variant}`'} | " + " | ".join(cells) + " |"
            )
        parts.append("")
    return "\n".join(parts).rstrip()


def _heading(model: str, records: list[Record]) -> str:
    speed = next(r for r in records if r.what == "tpot")
    s = speed.settings
    return (
        f"{model}, {s['prompt']}-token prompt, {s['new']} new tokens, batch 1, greedy, {s['threads']} threads, "
        f"{speed.machine.cpu} ({speed.machine.tier}), {s['bandwidth_gbps']} GB/s read, torch {speed.machine.torch}, "
        f"commit {speed.commit}, n = {speed.n} in turns; in parentheses the speed-up over the first row, in brackets "
        "the share of what the memory bandwidth allows:\n"
    )


def _cell(record: Record | None, baseline: Record | None, what: str) -> str:
    if record is None:
        return "-"
    text = f"{record.value:.0f}"
    if what in ("ttft", "tpot") and baseline is not None and baseline is not record:
        text += f" ({baseline.value / record.value:.2f}x)"
    if record.share_of_limit is not None:
        text += f" [{record.share_of_limit:.0%}]"
    return text


def insert(readme: str, table: str) -> str:
    """The README's text with the marked part replaced. Raises ValueError where the marks are missing."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.S)
    if not pattern.search(readme):
        raise ValueError(f"no {BEGIN} ... {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", readme)


def from_folder(folder: Path) -> str:
    return markdown(record for path in sorted(folder.glob("*.jsonl")) for record in read(path))


if __name__ == "__main__":
    results, readme = map(Path, sys.argv[1:3])
    readme.write_text(insert(readme.read_text(), from_folder(results)))
