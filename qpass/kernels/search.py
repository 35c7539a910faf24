"""Search: where measurement beats the model. The thresholds of one format on one shape, timed in under a second and kept in the cache."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qpass.cpu import Cpu
from qpass.errors import KernelError
from qpass.kernels import load, tuning
from qpass.kernels.format import KernelFormat
from qpass.kernels.plan import NEVER, Path, Tuning, linear_limit, paths

BUDGET_S = 1.0
MOST_COPIES_BYTES = 256 << 20
"""Of copies of the weight, which are walked through so that a call finds none of it in a cache: twice the last one, or this."""
PANEL_CANDIDATES = (8, 16, 32, 64, 128)
TILE_CANDIDATES = (1, 2, 4, 8, 16)
WINS = 0.97
"""A path replaces the one that the performance model chose only if it is faster by more than timing noise."""

ALWAYS: dict[Path, Tuning] = {
    "linear": Tuning(NEVER, NEVER, NEVER),
    "stream": Tuning(0, NEVER, NEVER),
    "panel": Tuning(0, 0, NEVER),
    "tiles": Tuning(0, NEVER, 0),
}
"""Thresholds that have every call walked in one way."""


def search(packed: Tensor, n: int, k: int, format: KernelFormat, cpu: Cpu) -> Tuning:
    """Time the paths of ``format`` on a weight [n, k], take the winners from now on, and remember them.

    The answer changes no result, only its speed. A cache that can't be written costs a search in the next process.
    """
    load.ensure(format, cpu=cpu)
    apart = min(2 * cpu.l3_bytes, MOST_COPIES_BYTES)
    copies = itertools.cycle([packed, *(packed.clone() for _ in range(min(63, apart // packed.numel())))])
    deadline = time.perf_counter() + BUDGET_S
    kernel = torch.ops.qpass.packed_linear.default
    scale = 1.0 if format.rule == "a8-static" else None

    def wins(path: Path, other: Path, m: int) -> bool:
        """Whether ``path`` beats ``other`` for M rows, in turns."""
        x = torch.ones(m, k, dtype=torch.bfloat16)
        times: dict[Path, list[float]] = {other: [], path: []}
        for _ in range(9 if m < 32 else 3):
            for each, taken in times.items():
                load.retune(format, ALWAYS[each], cpu)
                started = time.perf_counter()
                kernel(x, next(copies), None, None, None, n, k, format.number, 0, False, x_scale=scale)
                taken.append(time.perf_counter() - started)
        return statistics.median(times[path]) < WINS * statistics.median(times[other])

    found = load.tuning_of(format)
    try:
        found = _thresholds(format, cpu, found, wins, lambda: time.perf_counter() < deadline)
    finally:
        load.retune(format, found, cpu)
    with contextlib.suppress(KernelError):
        tuning.keep(format, cpu, cpu.tier, found)
    return found


def _thresholds(
    format: KernelFormat, cpu: Cpu, model: Tuning, wins: Callable[[Path, Path, int], bool], in_time: Callable[[], bool]
) -> Tuning:
    """Each threshold where the next path begins to win; the model's own where time ran out."""

    def chosen(path: Path, other: Path, m: int, *, modelled: bool) -> bool:
        """Whether ``path`` is to be taken for M rows rather than ``other``, of which the model chose one."""
        if not in_time():
            return modelled
        return not wins(other, path, m) if modelled else wins(path, other, m)

    linear, panel, tiles = model
    if paths(format, cpu.tier, 1) == ("tiles",):
        return model
    rows = range(1, linear_limit(format, cpu.tier) + 1)
    ends = (m for m in rows if not chosen("linear", "stream", m, modelled=m <= linear))
    linear = next(ends, len(rows) + 1) - 1
    if format.unpacks:
        begins = (m for m in PANEL_CANDIDATES if chosen("panel", "stream", m, modelled=m >= panel))
        panel = next(begins, max(panel, PANEL_CANDIDATES[-1] + 1))
    if cpu.tier == "amx":
        vector = Tuning(linear, panel, NEVER)
        begins = (
            m for m in TILE_CANDIDATES if chosen("tiles", vector.path(format, cpu.tier, m), m, modelled=m >= tiles)
        )
        tiles = next(begins, max(tiles, TILE_CANDIDATES[-1] + 1))
    return Tuning(linear, panel, tiles)
