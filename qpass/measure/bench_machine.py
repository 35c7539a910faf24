"""What the machine did beside a measurement: the limits it offered between the turns, and whether somebody else was at work."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qpass.cpu import Rates
from qpass.kernels.rates import measure, measured_cpu
from qpass.measure.record import quantile

SPREAD = 1.25
"""p90 over p10 of one variant's times from which on they are called disturbed: turns of a quiet machine stay below 1.1."""
STEAL = 0.02
"""The share of processor time that the host gave to others, from which on a run is called disturbed."""
OTHERS = 0.04
"""The share of processor time that went to other processes, from which on a run is called disturbed."""
_PROC = Path("/proc")


@dataclass
class Watch:
    """Takes the machine's rates between turns; says at the end what it saw.

    ``processes`` are those that are measured; whatever others used is disturbance.
    """

    processes: Sequence[int] = field(default_factory=lambda: (os.getpid(),))
    rates: list[Rates] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)  # whose turn follows each of ``rates``
    _before: Ticks = field(init=False)

    def __post_init__(self) -> None:
        self._before = processor_ticks(self.processes)

    def take(self, owner: str) -> None:
        self.rates.append(measure(measured_cpu()))
        self.owners.append(owner)

    def of(self, owner: str) -> list[Rates]:
        """The limits of each of an owner's turns: the mean of the rates before and behind it."""
        return [_mean(self.rates[i : i + 2]) for i, name in enumerate(self.owners) if name == owner]

    def settings(self) -> dict[str, Any]:
        """Bandwidth with its spread, all rates' medians, steal time and load, for a Record."""
        reads = sorted(rates.read_bytes / 1e9 for rates in self.rates)
        return {
            "bandwidth_gbps": round(quantile(reads, 0.5), 1),
            "bandwidth_p10_p90": [round(quantile(reads, q), 1) for q in (0.1, 0.9)],
            "rates": {name: statistics.median(asdict(r)[name] for r in self.rates) for name in asdict(self.rates[0])},
            **{name: round(share, 4) for name, share in self.shares().items()},
            "load": round(load_average(), 2),
        }

    def shares(self) -> dict[str, float]:
        """Of all processor time since the beginning: ``steal``, what the host gave to others, and ``others``, what other
        processes of this system used. Zeros where the system doesn't say."""
        now, then = processor_ticks(self.processes), self._before
        total = now.total - then.total
        if total <= 0:
            return {"steal": 0.0, "others": 0.0}
        others = (now.busy - then.busy) - (now.own - then.own)
        return {"steal": (now.steal - then.steal) / total, "others": max(0.0, others / total)}

    def disturbances(self, what: str = "", p10: float = 0.0, p90: float = 0.0) -> list[str]:
        """Sentences; none for a quiet machine. ``what`` varied from ``p10`` to ``p90``."""
        found, shares = [], self.shares()
        if p90 > SPREAD * p10:
            found.append(f"{what} varies from {p10:.3g} to {p90:.3g} (p10, p90)")
        if shares["steal"] > STEAL:
            found.append(f"the host gave {shares['steal']:.0%} of the processor time to others")
        if shares["others"] > OTHERS:
            found.append(f"other processes took {shares['others']:.0%} of the processor time")
        return found


@dataclass(frozen=True)
class Ticks:
    """Of all processors, since the machine started."""

    total: int = 0
    busy: int = 0
    steal: int = 0
    own: int = 0  # of the processes asked for, and their children that ended


def _mean(rates: Sequence[Rates]) -> Rates:
    values = [asdict(each) for each in rates]
    return Rates(**{name: statistics.fmean(each[name] for each in values) for name in values[0]})


def processor_ticks(processes: Sequence[int] = ()) -> Ticks:
    """What /proc says now; zeros where there is none. A process that is gone counts for nothing."""
    try:
        numbers = [int(word) for word in (_PROC / "stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return Ticks()
    user, nice, system, idle, wait, interrupts, soft, steal = numbers + [0] * (8 - len(numbers))
    own = 0
    for process in processes:
        try:
            text = (_PROC / str(process) / "stat").read_text()
        except OSError:
            continue
        own += sum(
            map(int, text.rpartition(")")[2].split()[11:15])
        )  # user and system time, and those of ended children
    busy = user + nice + system + interrupts + soft
    return Ticks(busy + idle + wait + steal, busy, steal, own)


def load_average() -> float:
    """Processes that run or want to, on average of the last minute; 0 where the system doesn't say."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return 0.0
