"""Tuning on this machine: the thresholds that a search measured, kept in the kernel cache; the model's where none was made."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from qpass.cpu import Cpu, Tier
from qpass.kernels import plan, store
from qpass.kernels.format import KernelFormat
from qpass.kernels.plan import Tuning
from qpass.kernels.store import cache_folder

VERSION = 9
"""Of the kernels that were timed, and of the file's meaning; another one is ignored."""


def _path(format: KernelFormat, cpu: Cpu, tier: Tier) -> Path:
    machine = "".join(c if c.isalnum() else "-" for c in f"{cpu.name}-{cpu.cores}-{cpu.l2_bytes}")
    return cache_folder() / "tuning" / f"{format.name}-{tier}-{machine}.json"


def tuned(format: KernelFormat, cpu: Cpu, tier: Tier) -> Tuning:
    """What a search found for this format on this machine, else what the model says."""
    return kept(format, cpu, tier) or plan.tuning(format, cpu, tier)


def kept(format: KernelFormat, cpu: Cpu, tier: Tier) -> Tuning | None:
    """What a search found for this format on this machine; None without one, or where its file makes no sense."""
    try:
        values = json.loads(_path(format, cpu, tier).read_text())
        if values.pop("version") == VERSION:
            found = Tuning(**{name: int(value) for name, value in values.items()})
            if all(0 <= rows <= plan.NEVER for rows in found):
                return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return None


def keep(format: KernelFormat, cpu: Cpu, tier: Tier, tuning: Tuning) -> None:
    """Remember a search's answer. Raises KernelError where the cache can't be written."""
    store.keep(_path(format, cpu, tier), {"version": VERSION, **asdict(tuning)})
