"""Search: where measurement beats the model. The thresholds of one format on one shape, timed in under a second and kept in the cache."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qpass.cpu import Cpu
from qpass.errors import KernelError
from qpass.kernels import load, tuning
from qpass.kernels.format import KernelFormat
from qpass.kernels.plan import NEVER, Path, Tuning, linear_limit

BUDGET_S = 1.0
LEAVES_CACHE = 64 << 20
"""Copies of the weight that are walked through: a decode step finds none of its weights in a cache."""
PANEL_CANDIDATES = (8, 16, 32, 64, 128)
TILE_CANDIDATES = (1, 2, 4, 8, 16)
WINS = 0.97
"""A path replaces a simpler one only if it is faster by more than timing noise."""

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
    copies = [packed, *(packed.clone() for _ in range(min(63, LEAVES_CACHE // packed.numel())))]
    deadline = time.perf_counter() + BUDGET_S
    kernel = torch.ops.qpass.packed_linear.default
    scale = 1.0 if format.rule == "a8-static" else None

    def seconds(path: Path, m: int) -> float:
        load.retune(format, ALWAYS[path], cpu)
        x = torch.ones(m, k, dtype=torch.bfloat16)
        times = []
        for i in range(6 if m < 32 else 3):
            started = time.perf_counter()
            kernel(x, copies[i % len(copies)], None, None, None, n, k, format.number, 0, False, x_scale=scale)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    found = load.tuning_of(format)
    try:
        found = _thresholds(format, cpu, found, seconds, lambda: time.perf_counter() < deadline)
    finally:
        load.retune(format, found, cpu)
    with contextlib.suppress(KernelError):
        tuning.keep(format, cpu, cpu.tier, found)
    return found


def _thresholds(
    format: KernelFormat, cpu: Cpu, model: Tuning, seconds: Callable[[Path, int], float], in_time: Callable[[], bool]
) -> Tuning:
    """Each threshold where the next path begins to win; the model's own where time ran out."""
    linear, panel, tiles = model
    if cpu.tier == "amx" and format.rule == "a16":
        return model  # one path
    if in_time():
        rows = range(1, linear_limit(format, cpu.tier) + 1)
        losing = (m for m in rows if in_time() and _wins(seconds, "stream", "linear", m))
        linear = next(losing, len(rows) + 1) - 1
    if format.unpacks and in_time():
        panel = next((m for m in PANEL_CANDIDATES if in_time() and _wins(seconds, "panel", "stream", m)), NEVER)
    if cpu.tier == "amx":
        vector = Tuning(linear, panel, NEVER)
        winning = (
            m for m in TILE_CANDIDATES if in_time() and _wins(seconds, "tiles", vector.path(format, cpu.tier, m), m)
        )
        tiles = next(winning, NEVER)
    return Tuning(linear, panel, tiles)


def _wins(seconds: Callable[[Path, int], float], path: Path, other: Path, m: int) -> bool:
    return seconds(path, m) < WINS * seconds(other, m)
