"""``qpass eval``: perplexity, divergence from the full-precision model, and HumanEval, scheme by scheme."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from qpass.frontends.commands import eval_tasks
from qpass.frontends.commands.eval_asked import FULL, Asked, matches

if TYPE_CHECKING:
    from qpass.measure.record import Record


def evaluate(asked: Asked) -> None:
    """A table on stdout, records in the file as they come; what is in the file already is not measured again.

    Raises QpassError.
    """
    asked.check()
    from qpass.measure import record

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    known = list(record.read(asked.output)) if asked.output is not None and asked.output.exists() else []
    done: list[Record] = []

    def keep(records: Iterable[Record]) -> None:
        records = list(records)
        done.extend(records)
        if asked.output is not None:
            record.append(asked.output, records)

    def had(wanted: Mapping[str, Any], *names: str) -> bool:
        """Whether every one of ``names`` was measured so before; then they are in the table."""
        found = {each.what: each for each in [*known, *done] if matches(each.settings, wanted)}
        done.extend(found[name] for name in names if name in found and found[name] not in done)
        return all(name in found for name in names)

    ids = None
    for scheme in asked.schemes:
        loaded = eval_tasks.load(asked.model)  # anew: what was packed goes with its weights
        if ids is None and {"perplexity", "kl"} & set(asked.tasks):
            ids = eval_tasks.text_tokens(asked, loaded)
        if ids is not None:
            eval_tasks.text_quality(asked, scheme, loaded, ids, had, keep)
        if "humaneval" in asked.tasks:
            eval_tasks.code_quality(asked, scheme, loaded, had, keep, console)
        del loaded
        _forget()
    Console().print(table(done, asked))


def _forget() -> None:
    """Compiled code holds the model that it was compiled for."""
    import torch

    torch._dynamo.reset()
    gc.collect()


def table(records: Sequence[Record], asked: Asked) -> Table:
    """A row a scheme: each number with the bounds of its 80% interval, perplexity with its loss over full precision."""
    found = {(each.settings["scheme"], each.what): each for each in records}
    columns = {
        "perplexity": "perplexity",
        "kl": "KL, nats",
        "kl_p99": "KL p99",
        "top1_agreement": "same top-1",
        "humaneval_pass@1": "HumanEval pass@1",
    }
    shown = {what: title for what, title in columns.items() if any(key[1] == what for key in found)}
    made = Table(title=f"qpass eval: {Path(asked.model).name}", title_justify="left")
    made.add_column("scheme")
    for title in shown.values():
        made.add_column(title, justify="right", no_wrap=True)
    base = found.get((FULL, "perplexity"))
    for scheme in dict.fromkeys(key[0] for key in sorted(found, key=lambda key: key[0] != FULL)):
        made.add_row(scheme, *(_cell(found.get((scheme, what)), base) for what in shown))
    return made


def _cell(record: Record | None, base: Record | None) -> str:
    if record is None:
        return "-"
    if record.what == "perplexity":
        over = "" if base is None or base is record else f" ({record.value / base.value - 1:+.2%})"
        return f"{record.value:.3f}{over}"
    if record.what == "top1_agreement":
        return f"{record.value:.2%}"
    if record.what == "humaneval_pass@1":
        low, high = record.settings["interval_95"]
        return f"{record.value:.1f}% [{low:.0f}..{high:.0f}] of {record.n}"
    return f"{record.value:.2g}"
