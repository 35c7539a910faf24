"""``qpass compare``: what got worse between two files of records."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qpass.errors import OptionError
from qpass.measure.compare import Change, describe, only_in
from qpass.measure.compare import compare as changes_of
from qpass.measure.record import Record, read

COLOURS = {"worse": "red", "better": "green", "same": "dim"}


def compare(old: Path, new: Path, *, tolerance: float) -> bool:
    """Print what changed; True if nothing got worse. Raises OptionError or CheckpointError for files of something else."""
    before, after = records_of(old), records_of(new)
    changes = changes_of(before, after)
    if not changes:
        raise OptionError(f"{old} and {new} have measured nothing in common")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    verdicts = [(change, change.verdict(tolerance)) for change in changes]
    told = [pair for pair in verdicts if pair[1] != "same"]
    if told:
        console.print(_table(told))
    for missing in only_in(before, after):
        console.print(f"[dim]only in {escape(old.name)}: {escape(missing)}[/dim]", soft_wrap=True)
    counts = {name: sum(verdict == name for _, verdict in verdicts) for name in COLOURS}
    console.print(
        f"{len(changes)} compared: {counts['worse']} worse, {counts['better']} better beyond their p10 to p90 and "
        f"{tolerance:.0%}, {counts['same']} the same",
        soft_wrap=True,
    )
    return not counts["worse"]


def records_of(path: Path) -> list[Record]:
    """All records of a file. Raises OptionError where there is none, CheckpointError for a line that is none."""
    if not path.is_file():
        raise OptionError(f"{path} does not exist; accepted: a .jsonl file of records")
    found = list(read(path))
    if not found:
        raise OptionError(f"{path} has no records")
    return found


def _table(rows: list[tuple[Change, str]]) -> Table:
    table = Table(title="changed beyond the noise", title_justify="left")
    for column in ("what", "over", "old", "p10..p90", "new", "p10..p90", "change", ""):
        table.add_column(column, justify="left" if column in ("what", "over", "") else "right", overflow="fold")
    for change, verdict in sorted(rows, key=lambda row: -abs(row[0].factor - 1)):
        unit = "" if change.over else f" {change.unit}"
        table.add_row(
            escape(describe(change.what, change.settings)),
            escape(change.over or "-"),
            *(
                cell
                for ends in (change.old, change.new)
                for cell in (f"{ends[1]:.4g}{unit}", f"{ends[0]:.4g}..{ends[2]:.4g}")
            ),
            f"{change.factor - 1:+.1%}",
            f"[{COLOURS[verdict]}]{verdict}[/]",
        )
    return table
