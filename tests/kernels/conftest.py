"""Kernels are built once, in parallel, and this machine's own ones serve again when a test is over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import FORMATS, HAS_AMX, SERVES, TIERS

from qpass.kernels import load


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    if SERVES:
        for tier in reversed(TIERS):
            load.ensure(*FORMATS, tier=tier, emulate_amx=tier == "amx" and not HAS_AMX)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    if SERVES:
        load.ensure(*FORMATS)
