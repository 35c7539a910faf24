"""Never slower than bf16: a site that loses the comparison keeps its weights, says so with both times, and computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import KernelError
from qpass.lowering import measured
from qpass.lowering.measured import Timing

WIDE = 1024  # squared: just large enough to be timed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDE)
        self.gate_proj, self.up_proj = nn.Linear(WIDE, WIDE, bias=False), nn.Linear(WIDE, WIDE, bias=False)
        self.down = nn.Linear(WIDE, WIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().to(torch.bfloat16).eval().requires_grad_(False)


def claim(monkeypatch: pytest.MonkeyPatch, ms: float, dense_ms: float, predicted_ms: float | None = None) -> None:
    """Have every timing end like this."""
    monkeypatch.setattr(measured, "_timings", {})
    predict = type(qpass.lowering.by_name("generated"))
    monkeypatch.setattr(predict, "predict_ms", lambda *args: predicted_ms if predicted_ms is not None else ms)
    monkeypatch.setattr(measured, "_interleaved", lambda calls, x, cpu: [ms, dense_ms][: len(calls)])


def test_a_site_that_loses_stays_as_it_was(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, ms=2.0, dense_ms=1.0)
    fast, x = qpass.compile(block, scheme="w4a16-g64", fullgraph=True), torch.randn(3, WIDE).to(torch.bfloat16)
    y = fast(x)
    records = qpass.explain(fast).records
    assert {record.lowering for record in records} == {"inductor"}
    assert {record.scheme for record in records} == {"w16a16"}
    assert all(record.bytes_after == record.bytes_before for record in records)
    text = str(qpass.explain(fast))
    assert "slower than the layer as it is (M = 3: 2.00 ms, unquantized 1.00 ms)" in text
    reference = block(x)
    error = (y - reference).float().norm() / reference.float().norm()
    assert error < 0.01  # nothing is quantized: what is left is where bf16 rounds


def test_a_site_that_wins_is_quantized(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, ms=1.0, dense_ms=2.0)
    fast = qpass.compile(block, scheme="w4a16-g64", fullgraph=True)
    fast(torch.randn(3, WIDE).to(torch.bfloat16))
    records = qpass.explain(fast).records
    assert "inductor" not in {record.lowering for record in records}
    assert [(record.m, record.measured_ms, record.dense_ms) for record in records] == [(3, 1.0, 2.0)] * 2
    assert "M = 3: 2.00 -> 1.00 ms" in str(qpass.explain(fast))


@pytest.mark.parametrize("insists", [{"insist": True}, {"lowering": "reference"}, {"release_weights": True}])
def test_who_insists_gets_it(block: Block, monkeypatch: pytest.MonkeyPatch, insists: dict[str, object]) -> None:
    claim(monkeypatch, ms=2.0, dense_ms=1.0)
    fast = qpass.compile(block, scheme="w4a16-g64", fullgraph=True, **insists)
    fast(torch.randn(3, WIDE).to(torch.bfloat16))
    assert "inductor" not in {record.lowering for record in qpass.explain(fast).records}


def test_a_machine_whose_rates_cannot_be_measured_still_compiles(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that can't be written holds the model's kernels and not the unit of the rates: the clock alone decides."""

    def refuse(*args: object) -> float:
        raise KernelError("the kernel cache can't be written")

    for ms, scheme in ((1.0, "w4a16-g64"), (3.0, "w16a16")):
        claim(monkeypatch, ms=ms, dense_ms=2.0)
        monkeypatch.setattr(type(qpass.lowering.by_name("generated")), "predict_ms", refuse)
        fast = qpass.compile(block, scheme="w4a16-g64", fullgraph=True)
        fast(torch.randn(3, WIDE).to(torch.bfloat16))
        records = qpass.explain(fast).records
        assert {record.scheme for record in records} == {scheme}
        assert all(record.predicted_ms is None for record in records)
        torch._dynamo.reset()


def test_noise_decides_nothing() -> None:
    assert Timing(1, ms=1.2, dense_ms=1.0, predicted_ms=1.0).loses
    assert not Timing(1, ms=1.05, dense_ms=1.0, predicted_ms=1.0).loses  # as much as two runs of one code differ
    assert not Timing(1, ms=30.0, dense_ms=1.0, predicted_ms=1.0).loses  # thirty times the model: a busy machine
    assert not Timing(1, ms=2.0, dense_ms=None, predicted_ms=1.0).loses  # nothing to compare with


def test_small_and_varying_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_interleaved", lambda *args: pytest.fail("a small site was timed"))
    small = nn.Linear(64, 64).to(torch.bfloat16).eval().requires_grad_(False)
    fast = qpass.compile(lambda x: small(x), scheme="w8a16", fullgraph=True)
    fast(torch.randn(2, 64).to(torch.bfloat16))
    assert qpass.explain(fast).records[0].measured_ms is None
    assert measured.tokens_of(torch.empty(2, 5, 64)) == 10
    assert measured.tokens_of(torch.empty(64)) == 1
    assert measured.tokens_of(None) == measured.PROMPT


def test_a_real_site_is_really_timed(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_timings", {})
    fast = qpass.compile(block, scheme="w4a16-g64", fullgraph=True, insist=True)
    fast(torch.randn(1, WIDE).to(torch.bfloat16))
    for record in qpass.explain(fast).records:
        assert record.m == 1
        assert record.measured_ms is not None
        assert record.dense_ms is not None
        assert 0 < record.measured_ms < 1000
        if record.lowering == "generated":
            assert record.predicted_ms is not None
            assert 0 < record.predicted_ms < 10
