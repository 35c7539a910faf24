"""What the backend did, kept for explain: one report a compiled graph."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qpass.passes.context import SiteRecord


@dataclass(frozen=True)
class GraphReport:
    """``counts`` by pass; ``left`` says why a linear or an expert weight was left as it is; seconds are wall time."""

    records: tuple[SiteRecord, ...]
    counts: dict[str, int]
    left: dict[str, str]
    passes_seconds: float
    inductor_seconds: float
    released_bytes: int
    owner: Any  # the options object of one compile call
    parameters: tuple[weakref.ref[Tensor], ...] = field(repr=False, default=())

    def speaks_of(self, parameters: set[int]) -> bool:
        alive = (ref() for ref in self.parameters)
        return any(p is not None and id(p) in parameters for p in alive)


_REPORTS: list[GraphReport] = []


def add(report: GraphReport) -> None:
    """Keep a report as long as one of its parameters lives."""
    _REPORTS[:] = [r for r in _REPORTS if any(ref() is not None for ref in r.parameters)]
    _REPORTS.append(report)


def of(parameters: list[Tensor], owner: Any = None) -> list[GraphReport]:
    """The reports of graphs that use any of ``parameters``; only those of one compile call when ``owner`` is given."""
    ids = {id(p) for p in parameters}
    return [r for r in _REPORTS if r.speaks_of(ids) and (owner is None or r.owner is owner)]


def of_owner(owner: Any) -> list[GraphReport]:
    return [r for r in _REPORTS if r.owner is owner]
