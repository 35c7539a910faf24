"""Progress for waits over two seconds, on stderr, only where a person watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

shown: ContextVar[bool | None] = ContextVar("shown", default=None)
"""True or False to force; None: where stderr is a terminal."""


def _console() -> Console | None:
    wanted = shown.get()
    if wanted or (wanted is None and sys.stderr.isatty()):
        return Console(stderr=True)
    return None


@contextmanager
def quantizing() -> Iterator[Callable[[int, int, str], None]]:
    """Gives a function (done, total, name) that draws a bar while weights are quantized and packed."""
    console = _console()
    if console is None:
        yield lambda done, total, name: None
        return
    columns = (
        TextColumn("quantizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total, name: progress.update(task, completed=done, total=total, description=name)


@contextmanager
def calibrating(total: int) -> Iterator[Callable[[int, str], None]]:
    """Gives a function (steps, block) that moves a bar of ``total`` steps, with the time that is left beside it."""
    console = _console()
    if console is None:
        yield lambda steps, block: None
        return
    columns = (
        TextColumn("quantizing"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn("[dim]{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, speed_estimate_period=600) as progress:
        task = progress.add_task("", total=total)
        yield lambda steps, block: progress.update(task, advance=steps, description=block)


def waiting(text: str):  # type: ignore[no-untyped-def]
    """A spinner with the seconds beside it."""
    console = _console()
    if console is None:
        return nullcontext()
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    )
    progress.add_task(text, total=None)
    return progress


@contextmanager
def counting(text: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Gives a function (done, note="") that draws a bar; ``total`` None: of unknown length."""
    console = _console()
    if console is None:
        yield lambda done, note="": None
        return
    columns = (
        TextColumn(text),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda done, note="": progress.update(task, completed=done, description=note)
