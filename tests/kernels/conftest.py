"""Kernels are built once, in parallel, and those that served before serve again when a test is over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attention_units import UNITS
from kernel_cases import CPU, SERVES, use

from qpass.kernels import attention_unit, load
from qpass.kernels.format import KernelFormat


@pytest.fixture(scope="session", autouse=True)
def built(request: pytest.FixtureRequest) -> None:
    """What the tests of this run ask for by their parameters; the machine's own tier last, so that it stays."""
    wanted: dict[str, dict[KernelFormat, None]] = {}
    for item in request.session.items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if isinstance(parameters.get("format"), KernelFormat):
            wanted.setdefault(parameters.get("tier", CPU.tier), {})[parameters["format"]] = None
    if SERVES:
        for tier in sorted(wanted, key=lambda tier: tier == CPU.tier):
            use(*wanted[tier], tier=tier)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    before = dict(load._registered)
    with torch.no_grad():
        yield
    for number, kernel in before.items():
        if load._registered[number] != kernel:
            load._register(KernelFormat.of(number), kernel)


@pytest.fixture(params=UNITS, ids=lambda unit: f"{unit[0]}{'' if unit[1] else '-nopairs'}")
def unit(request) -> Iterator[None]:
    tier, pairs = request.param
    attention_unit.ensure(tier=tier, pairs=pairs, emulate=tier == "amx" and not CPU.runs("amx"))
    yield
    attention_unit.ensure()


@pytest.fixture
def native() -> None:
    attention_unit.ensure()
