"""What one token takes in a linear of each scheme: timed once on this machine, and kept in the kernel cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qpass.cpu import Cpu
from qpass.errors import KernelError
from qpass.kernels import plan, store, tuning
from qpass.kernels.store import cache_folder
from qpass.lowering.measured import DISTURBED, SMALLEST
from qpass.measure.linear import candidate, format_of, interleaved
from qpass.scheme import Scheme

ROUNDS = 7
TRIES = 3


def token_seconds(n: int, k: int, schemes: Sequence[Scheme], cpu: Cpu, dense_bytes: int = 2) -> dict[str, float]:
    """Seconds of one token in a linear of N outputs and K inputs, by scheme, weights from memory; timed in turns.

    ``dense_bytes``: of an unquantized weight. Timed are two (bfloat16); four are read in twice the time.

    The same answer ever after on this machine, with these kernels and threads, so that whoever decides by it decides twice
    alike. The performance model's word, at typical rates, for layers too small for the clock, where nothing can be compiled, and for a
    clock that thrice disagrees by a factor of three: something else is running.
    """
    found = _seconds(n, k, schemes, cpu)
    return {s.name: found[s.name] * (dense_bytes / 2 if s.weight is None else 1) for s in schemes}


def _seconds(n: int, k: int, schemes: Sequence[Scheme], cpu: Cpu) -> dict[str, float]:
    modelled = {scheme.name: predicted_seconds(n, k, scheme, cpu) for scheme in schemes}
    if n * k < SMALLEST:
        return modelled
    path = _path(n, k, schemes, cpu)
    found = _kept(path, modelled)
    if found is not None:
        return found
    try:
        for _ in range(TRIES):
            found = _timed(n, k, schemes)
            if all(found[name] < DISTURBED * seconds for name, seconds in modelled.items()):
                with contextlib.suppress(
                    KernelError
                ):  # a cache that can't be written costs the next process a measurement
                    store.keep(path, found)
                return found
    except KernelError:  # nothing can be compiled here
        pass
    return modelled


def predicted_seconds(n: int, k: int, scheme: Scheme, cpu: Cpu) -> float:
    """The performance model's word at typical rates: a pure function of its arguments."""
    rates = plan.typical_rates(cpu.tier)
    if scheme.weight is None:
        return plan.core_of(cpu.tier).call_seconds + 2 * n * k / rates.read_bytes
    return plan.plan(plan.Shape(1, n, k), format_of(scheme), replace(cpu, rates=rates)).seconds


def _timed(n: int, k: int, schemes: Sequence[Scheme]) -> dict[str, float]:
    x = torch.randn(1, k, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    candidates = {s.name: candidate("bf16" if s.weight is None else s.name, n, k) for s in schemes}
    with torch.no_grad():
        return interleaved(candidates, x, ROUNDS)


def _path(n: int, k: int, schemes: Sequence[Scheme], cpu: Cpu) -> Path:
    about = (tuning.VERSION, cpu.name, cpu.cores, cpu.tier, torch.get_num_threads(), n, k, [s.name for s in schemes])
    return cache_folder() / "times" / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:32]}.json"


def _kept(path: Path, wanted: dict[str, float]) -> dict[str, float] | None:
    """What was timed before; None without it, or where the file makes no sense."""
    try:
        values = {str(name): float(seconds) for name, seconds in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    good = values.keys() == wanted.keys() and all(0 < seconds < float("inf") for seconds in values.values())
    return values if good else None
