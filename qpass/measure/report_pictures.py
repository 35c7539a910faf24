"""The tables and pictures of a README, made from the same Records as the report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from qpass.measure.pictures import draw_times
from qpass.measure.record import Record
from qpass.measure.report_data import LABELS, Case, Model, models


def write(records: Iterable[Record], folder: Path) -> list[Path]:
    """``MODEL.md`` with the recipe tables, and ``MODEL-prompt-PxB.png`` with the bars of each prompt and batch."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for model in models(records):
        if not model.cases:
            continue
        name = re.sub(r"[^\w.-]+", "-", model.name) or "model"
        table = folder / f"{name}.md"
        table.write_text(recipe_markdown(model) + "\n", encoding="utf-8")
        written.append(table)
        for case in model.cases:
            beside = "-beside" if case.beside else ""
            picture = folder / f"{name}-prompt-{case.prompt}x{case.batch}{beside}.png"
            draw_times(
                _bars(case), f"{model.name}, {case.prompt}-token prompt, batch {case.batch}, {model.machine}", picture
            )
            written.append(picture)
    return written


def _bars(case: Case) -> dict[str, list[tuple[str, Record]]]:
    return {
        what: [(row.label, row.records[what]) for row in case.rows if what in row.records] for what in ("tpot", "ttft")
    }


def recipe_markdown(model: Model, cases: Sequence[Case] | None = None) -> str:
    """The recipe table of each prompt and batch: what is stored, quality, TTFT and TPOT, their gains over the first row
    and in brackets their shares of the machine's limit, bytes read, with machine, commit, n and spread."""
    parts: list[str] = []
    said = ""
    for case in model.cases if cases is None else cases:
        speeds = [row.records[what] for row in case.rows for what in ("ttft", "tpot") if what in row.records]
        s, counts = case.settings, sorted({r.n for r in speeds})
        widest = max((r.p90 / r.p10 for r in speeds if r.p10), default=1.0)
        turns = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
        commits = ", ".join(dict.fromkeys(r.commit for r in speeds))
        read = f", {float(s['bandwidth_gbps']):.1f} GB/s read" if "bandwidth_gbps" in s else ""
        about = (
            f"{s.get('new', '?')} new tokens, batch {case.batch}, greedy, {s.get('threads', '?')} threads, {model.machine}, "
            f"torch {speeds[0].machine.torch}, commit {commits}, medians of {turns} turns"
        )
        noise = f"p90 at most {widest:.2f} of p10"
        if about == said:
            parts.append(f"The same with a {case.prompt}-token prompt{read}, {noise}:\n")
        else:
            parts.append(
                f"{model.name}, {case.prompt}-token prompt, {about}{read}, {noise}; in parentheses the gain over the first row, "
                "in brackets the share of the limit (with a draft, of its own bound):\n"
            )
        said = about
        passed = any(model.passed(row.scheme) for row in case.rows)
        known = any(row.megabytes for row in case.rows)
        perplexity = any("perplexity" in model.quality.get(row.scheme, {}) for row in case.rows)
        head = [
            "recipe",
            *["HumanEval pass@1"] * passed,
            *["perplexity"] * perplexity,
            "TTFT ms",
            "TPOT ms",
            *["MB read a step"] * known,
        ]
        parts.append("| " + " | ".join(head) + " |\n|---|" + "---:|" * (len(head) - 1))
        for row in case.rows:
            cells = [row.label if row.variant in LABELS or row.peer else f"`{row.label}`"]
            if passed:
                score = model.passed(row.scheme)
                cells.append("-" if score is None else f"{score.value * (1 if score.unit == '%' else 100):.1f}%")
            if perplexity:
                found = model.quality.get(row.scheme, {}).get("perplexity")
                cells.append("-" if found is None else f"{found.value:.3f}")
            for what in ("ttft", "tpot"):
                record, gain = row.records.get(what), row.speed_up(what)
                text = (
                    "-" if record is None else f"{record.value:.0f}" if record.value >= 100 else f"{record.value:.1f}"
                )
                if record is not None and gain and row.over is not row:
                    text += f" ({gain:.2f}x)"
                if record is not None and record.share_of_limit is not None:
                    text += f" [{record.share_of_limit:.0%}]"
                cells.append(text)
            if known:
                cells.append(f"{row.megabytes:.0f}" if row.megabytes else "-")
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts).rstrip()
