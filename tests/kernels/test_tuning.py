"""Thresholds: data of a call, never seen in its bits; searched once a machine, remembered, and forgotten when they make no sense."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from kernel_cases import SERVES, Weight, run

from qpass.cpu import detect
from qpass.kernels import load, plan, tuning
from qpass.kernels.format import KernelFormat
from qpass.kernels.plan import NEVER, Tuning
from qpass.kernels.search import _thresholds, search

pytestmark = pytest.mark.skipif(not SERVES, reason="needs a tier that the kernels serve")

FORMATS = [
    KernelFormat(4, 64, "a16", 2),
    KernelFormat(4, 64, "a8-token-group", 2),
    KernelFormat(8, None, "a8-token", 4),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tunings of this test go to a folder of its own; units stay where they are built already."""
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_the_path_is_not_in_the_bits(format: KernelFormat) -> None:
    load.ensure(format)
    weight = Weight.random(130, 192, format)
    packed = weight.packed()
    before = load.tuning_of(format)
    for m in (1, 2, 5, 13, 70):
        x = torch.randn(m, 192).to(torch.bfloat16)
        results = []
        for linear, panel in itertools.product((0, NEVER), (0, 8, NEVER)):
            load.retune(format, Tuning(linear, panel, NEVER))
            results.append(run(x, weight, packed=packed))
        assert all(torch.equal(results[0], other) for other in results[1:]), m
    load.retune(format, before)


@pytest.mark.parametrize("model", [Tuning(0, NEVER, 2), Tuning(2, 16, 8), Tuning(1, 13, NEVER)])
def test_the_model_is_kept_unless_another_path_wins(model: Tuning) -> None:
    format, cpu, sizes = FORMATS[1], detect(), (1, 2, 4, 8, 16, 32, 64, 128)

    def paths(tuning: Tuning) -> list[plan.Path]:
        return [tuning.path(format, cpu.tier, m) for m in sizes]

    assert paths(_thresholds(format, cpu, model, lambda path, other, m: False, lambda: True)) == paths(model)
    assert paths(_thresholds(format, cpu, model, lambda *_: pytest.fail("out of time"), lambda: False)) == paths(model)
    streaming = _thresholds(format, cpu, model, lambda path, other, m: path == "stream", lambda: True)
    assert "linear" not in paths(streaming)
    assert "panel" not in paths(streaming)


def test_a_search_is_remembered() -> None:
    format, cpu = FORMATS[0], detect()
    weight = Weight.random(512, 512, format)
    load.ensure(format)
    before = load.tuning_of(format)
    assert tuning.kept(format, cpu, cpu.tier) is None
    assert tuning.tuned(format, cpu, cpu.tier) == plan.tuning(format, cpu)
    try:
        found = search(weight.packed(), 512, 512, format, cpu)
        assert load.tuning_of(format) == found == tuning.tuned(format, cpu, cpu.tier)
        assert tuning.kept(format, cpu, cpu.tier) == found
        assert 0 <= found.linear_rows <= plan.linear_limit(format, cpu.tier)
    finally:
        load.retune(format, before)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 99}', '{"version": 1, "linear_rows": -1, "panel_rows": 1, "tile_rows": 1}', "\0"],
)
def test_a_file_that_makes_no_sense_is_ignored(text: str) -> None:
    format, cpu = FORMATS[1], detect()
    tuning.keep(format, cpu, cpu.tier, Tuning(1, 2, 3))
    assert tuning.tuned(format, cpu, cpu.tier) == Tuning(1, 2, 3)
    tuning._path(format, cpu, cpu.tier).write_text(text)
    assert tuning.kept(format, cpu, cpu.tier) is None  # so it is searched again
    assert tuning.tuned(format, cpu, cpu.tier) == plan.tuning(format, cpu)


def test_rates_are_limits() -> None:
    """A dot product multiplies twice as many int8 values as bf16 ones, and is one vector instruction at most."""
    from qpass.kernels.rates import measured_cpu

    rates = measured_cpu().rates
    assert rates is not None
    assert rates.int8_macs > rates.bf16_macs > 0
    assert 1e9 < rates.read_bytes < 2e12
    assert (
        rates.vector_ops * 64 * 1.3 > rates.int8_macs
    )  # a dot product is one vector instruction; clocks drift between the two
