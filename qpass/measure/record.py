"""A measured number with everything needed to judge it later, and the append-only file such numbers live in."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from qpass.cpu import detect
from qpass.errors import CheckpointError


@dataclass(frozen=True)
class Machine:
    """Where a number was measured."""

    cpu: str
    cores: int
    tier: str
    torch: str

    @classmethod
    def here(cls) -> Machine:
        import torch

        cpu = detect()
        return cls(cpu.name, cpu.cores, cpu.tier, torch.__version__)


@dataclass(frozen=True)
class Record:
    """``value`` is the median of ``n`` observations in ``unit``; p10 and p90 are their spread.

    ``share_of_limit`` is limit / value for a time (what the hardware allows over what was reached), None where no limit
    is known.
    """

    what: str
    value: float
    unit: str
    n: int
    p10: float
    p90: float
    machine: Machine
    commit: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    share_of_limit: float | None = None

    @property
    def median(self) -> float:
        return self.value

    @classmethod
    def of(
        cls,
        what: str,
        observed: Sequence[float],
        unit: str,
        settings: Mapping[str, Any] | None = None,
        limit: float | None = None,
    ) -> Record:
        """From the observations themselves. Raises ValueError when there is none."""
        if not observed:
            raise ValueError(f"{what}: nothing was observed")
        ordered = sorted(observed)
        value = quantile(ordered, 0.5)
        return cls(
            what=what,
            value=value,
            unit=unit,
            n=len(ordered),
            p10=quantile(ordered, 0.1),
            p90=quantile(ordered, 0.9),
            machine=Machine.here(),
            commit=commit(),
            settings=dict(settings or {}),
            share_of_limit=limit / value if limit is not None and value else None,
        )


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of sorted numbers, linear between neighbours."""
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@cache
def commit() -> str:
    """The commit of the source tree that this package runs from, with ``+`` for changes; "unknown" outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def append(path: Path, records: Iterable[Record]) -> None:
    """Add one JSON line a record; what is in the file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Iterator[Record]:
    """The records of a file, oldest first. Raises CheckpointError with the line that isn't one."""
    names = {f.name for f in fields(Record)}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
            values["machine"] = Machine(**values["machine"])
            yield Record(**{name: values[name] for name in names if name in values})
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}:{number} is not a record: {error}") from error
