"""``qpass.explain``: what became of every linear of a compiled model, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from qpass.errors import OptionError
from qpass.frontends import reports
from qpass.lowering import ANY
from qpass.passes.context import SiteRecord


@dataclass(frozen=True)
class Explanation:
    """``records``, a site once however many graphs use it; printing gives the table, layers alike in one row."""

    records: tuple[SiteRecord, ...]
    left: dict[str, str]
    graphs: tuple[reports.GraphReport, ...]

    @property
    def bytes_before(self) -> int:
        return sum(record.bytes_before for record in self.records)

    @property
    def bytes_after(self) -> int:
        return sum(record.bytes_after for record in self.records)

    def table(self, *, full: bool = False) -> Table:
        """One row a site; layers that differ in their number only share a row unless ``full``."""
        table = Table(title="qpass: what became of each linear", title_justify="left")
        for column in ("site", "count", "N x K", "scheme", "lowering", "fused", "MB before", "MB after", "timed"):
            numeric = column in ("count", "N x K", "MB before", "MB after")
            table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
        for record, count in _rows(self.records, full):
            table.add_row(
                record.name,
                str(count),
                f"{record.n} x {record.k}",
                record.scheme,
                record.lowering,
                " ".join(record.fused) or "-",
                f"{count * record.bytes_before / 1e6:.2f}",
                f"{count * record.bytes_after / 1e6:.2f}",
                _timed(record),
            )
        table.add_section()
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        table.add_row("all linears", str(len(self.records)), "", "", "", "", f"{before:.2f}", f"{after:.2f}", "")
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(width=160, no_color=True, force_terminal=False)
        with console.capture() as capture:
            if not self.graphs:
                console.print("nothing is compiled yet: call the model once, then explain it")
            else:
                console.print(self.table())
                for line in self.footnotes():
                    console.print(line, soft_wrap=True, markup=False)
        return capture.get()

    def promise(self) -> str:
        """Whether a token's result depends on the tokens computed with it, which is what exact speculation rests on."""
        return _rows_promise(self.records) if self.records else "no linear is quantized"

    def footnotes(self) -> Iterator[str]:
        """Refusals, what was left as it is, and what the graphs cost."""
        for record, count in _rows(self.records, full=False):
            for note in record.notes:
                yield f"{record.name}{f' (x{count})' if count > 1 else ''}: {note}"
        reasons: dict[tuple[str, str], int] = {}
        for name, reason in self.left.items():
            key = (numberless(name), reason)
            reasons[key] = reasons.get(key, 0) + 1
        if self.records:
            yield _rows_promise(self.records)
        for (name, reason), count in reasons.items():
            yield f"left as it is: {name}{f' (x{count})' if count > 1 else ''}: {reason}"
        for index, graph in enumerate(self.graphs):
            counts = ", ".join(f"{name} {count}" for name, count in graph.counts.items())
            yield (
                f"graph {index}: {counts}; quantized and packed in {graph.passes_seconds:.1f} s, Inductor {graph.inductor_seconds:.1f} s"
                + (
                    f"; {graph.released_bytes / 1e6:.1f} MB of full-precision weights released"
                    if graph.released_bytes
                    else ""
                )
            )


def explain(compiled: Any) -> Explanation:
    """What was done to ``compiled``: the result of ``qpass.compile``, of ``torch.compile(..., backend="qpass")``, or a module.

    Raises OptionError for anything else.
    """
    owner = getattr(compiled, "_qpass_backend", None)
    if owner is not None:
        graphs = reports.of_owner(owner)
    elif isinstance(compiled, nn.Module):
        graphs = reports.of(list(compiled.parameters()), owner=_options_of(compiled))
    else:
        raise OptionError(f"explain takes a compiled model or function, not {type(compiled).__name__}")
    records: dict[str, SiteRecord] = {}
    left: dict[str, str] = {}
    for graph in graphs:
        for record in graph.records:
            records.setdefault(record.name, record)
        left.update(graph.left)
    return Explanation(tuple(records.values()), left, tuple(graphs))


def _options_of(module: nn.Module) -> Any:
    """The options object given to ``torch.compile``, which tells two compiled forms of one model apart."""
    callback = getattr(getattr(module, "dynamo_ctx", None), "callback", None)
    while callback is not None and not hasattr(callback, "kwargs"):
        callback = getattr(callback, "_torchdynamo_orig_backend", None)
    return getattr(callback, "kwargs", {}).get("options")


def _rows_promise(records: tuple[SiteRecord, ...]) -> str:
    """Whether a token's result depends on the tokens computed with it, which is what exact speculation rests on."""
    least = min(record.same_rows for record in records)
    if least >= ANY:
        return "rows: every linear gives a token the same bits, however many are computed at once"
    unsure = sorted({f"{record.scheme} by {record.lowering}" for record in records if record.same_rows == 0})
    if unsure:
        return f"rows: a token's last bits may depend on how many are computed at once ({', '.join(unsure)})"
    return f"rows: every linear gives a token the same bits, for up to {least} computed at once"


def _timed(record: SiteRecord) -> str:
    """One call alone, at compilation: as it was, and as it is now; what the model predicts; bytes read a second."""
    if record.measured_ms is None:
        return "-"
    was = "" if record.dense_ms is None else f"{record.dense_ms:.2f} -> "
    rate = f", {record.bytes_after / record.measured_ms / 1e6:.0f} GB/s" if record.m <= 16 else ""
    predicted = "" if record.predicted_ms is None else f" (model {record.predicted_ms:.2f}{rate})"
    return f"M = {record.m}: {was}{record.measured_ms:.2f} ms{predicted}"


def numberless(name: str) -> str:
    """A module's name with a star for each layer's number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _rows(records: tuple[SiteRecord, ...], full: bool) -> Iterator[tuple[SiteRecord, int]]:
    if full:
        yield from ((record, 1) for record in records)
        return
    counts: dict[SiteRecord, int] = {}
    for record in records:
        key = replace(record, names=(), name=numberless(record.name))
        counts[key] = counts.get(key, 0) + 1
    yield from counts.items()
