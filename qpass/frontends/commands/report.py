"""``qpass report``: records as one page, and as the tables and pictures of a README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from qpass.errors import CheckpointError, OptionError
from qpass.frontends import trace
from qpass.frontends.commands.compare import records_of
from qpass.measure.record import Record
from qpass.measure.report import page


def report(sources: Sequence[Path], *, output: Path, title: str, pictures: Path | None = None) -> None:
    """Write the page. Raises OptionError or CheckpointError for what is no file of records."""
    if output.suffix not in (".html", ".htm") or not output.parent.is_dir():
        raise OptionError(f"--output {output}: accepted is a file .html in a folder that exists")
    files = [file for source in sources for file in (sorted(source.glob("*.jsonl")) if source.is_dir() else [source])]
    if not files:
        raise OptionError(f"{sources[0]} has no .jsonl files")
    records = [record for file in files for record in records_of(file)]
    try:
        text = page(records, title, traces=_traces(records), style=trace.COLOURS + trace.SECTION)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"a record of {', '.join(map(str, files))} lacks what the report needs: {error!r}"
        ) from error
    part = output.with_name(f".{output.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(output)
    console = Console(highlight=False)
    console.print(f"{output}: {len(records)} records", markup=False, soft_wrap=True)
    if pictures is not None:
        from qpass.measure.report_pictures import write

        for path in write(records, pictures):
            console.print(str(path), markup=False, soft_wrap=True)


def _traces(records: Sequence[Record]) -> dict[str, list[tuple[str, str]]]:
    """By model, the last speculative generation of each variant."""
    latest = {(r.settings["model"], r.settings["variant"]): r for r in records if r.what == "trace"}
    found: dict[str, list[tuple[str, str]]] = {}
    for i, ((model, variant), record) in enumerate(latest.items()):
        headline = f"Who proposed each token: {variant}"
        found.setdefault(model, []).append((headline, trace.section_of(record.settings, f"refused{i}")))
    return found
