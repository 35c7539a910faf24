"""GPTQ against the paper's own loop, against round to nearest, and at the edges of its input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpass.algorithms.clip import span
from qpass.algorithms.gptq import aligned, factor, gptq
from qpass.algorithms.rtn import rtn
from qpass.scheme import Format

N, K, SAMPLES = 48, 160, 640
GROUPED = [
    Format(bits, group, sym) for bits in (2, 3, 4, 8) for group in (16, 32, 64, 128, None) for sym in (False, True)
] + [Format(bits, 32, False, True) for bits in (2, 4)]


def _layer(seed: int = 0, n: int = N, k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, correlated inputs with a few loud channels, and their Hessian."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g) * 0.05
    mixed = torch.randn(SAMPLES, k // 4, generator=g) @ torch.randn(k // 4, k, generator=g)
    x = mixed + torch.randn(SAMPLES, k, generator=g)
    x[:, ::37] *= 8
    return weight, x, x.t() @ x / SAMPLES


def _loss(weight: Tensor, quantized, x: Tensor) -> float:  # type: ignore[no-untyped-def]
    return float(((quantized.dequantize() - weight) @ x.t()).square().mean())


def _algorithm_1(weight: Tensor, hessian: Tensor, format: Format, act_order: bool, damping: float) -> Tensor:
    """The paper's loop, column by column in fp64, over the static ranges of the whole groups: dequantized [N, K]."""
    scales, zeros = (t.double() for t in span(weight, format))
    h = hessian.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(len(h))
    t = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    w, q = weight.double()[:, order].clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for j in range(len(h)):
        index = int(order[j]) // (format.group or len(h))
        scale, zero = scales[:, index], zeros[:, index]
        rounded = (w[:, j] / scale + zero).round().clamp(0, format.max_code)
        q[:, j] = (rounded - zero) * scale
        w[:, j:] -= ((w[:, j] - q[:, j]) / t[j, j])[:, None] * t[j, j:]
    return torch.empty_like(q).index_copy_(1, order, q).float()


@pytest.mark.parametrize("act_order", [True, False])
def test_the_codes_are_those_of_the_papers_algorithm(act_order: bool) -> None:
    weight, _, hessian = _layer()
    format = Format(4, None)  # one range a row: static in either order
    ours = gptq(weight, hessian, format, act_order=act_order, grid="whole", block=32).dequantize()
    theirs = _algorithm_1(weight, hessian, format, act_order, 0.01)
    differ = (ours - theirs).abs() > 1e-5
    assert float(differ.float().mean()) < 0.002  # ties that fp32 breaks otherwise than fp64


def test_static_groups_in_the_order_of_activations_are_the_papers_too() -> None:
    weight, _, hessian = _layer()
    format = Format(3, 32)
    ours = gptq(weight, hessian, format, act_order=True, grid="whole").dequantize()
    theirs = _algorithm_1(weight, hessian, format, True, 0.01)
    assert float(((ours - theirs).abs() > 1e-5).float().mean()) < 0.002


@pytest.mark.parametrize("format", GROUPED, ids=str)
@pytest.mark.parametrize("act_order", [True, False])
def test_the_output_is_nearer_than_rounding_to_nearest(format: Format, act_order: bool) -> None:
    weight, x, hessian = _layer()
    ours, plain = gptq(weight, hessian, format, act_order=act_order, grid="clipped"), rtn(weight, format)
    assert _loss(weight, ours, x) < 0.6 * _loss(weight, plain, x)
    assert int(ours.codes.max()) <= format.max_code
    if format.group and format.bits < 8:
        assert torch.equal(ours.scales.half().float(), ours.scales)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    "format",
    [Format(4, 32), Format(3, 64, True), Format(8, None, True), Format(2, 128), Format(3, 32, False, True)],
    ids=str,
)
def test_inputs_that_are_independent_leave_rounding_to_nearest(format: Format, act_order: bool) -> None:
    weight, *_ = _layer()
    ours, plain = gptq(weight, torch.eye(K), format, act_order=act_order, grid="whole"), rtn(weight, format)
    assert torch.equal(ours.scales, plain.scales)
    assert torch.equal(ours.zeros, plain.zeros)
    assert torch.equal(ours.codes, plain.codes)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_block_changes_nothing(act_order: bool) -> None:
    weight, x, hessian = _layer()
    format = Format(4, 32)
    runs = [
        gptq(weight, hessian, format, act_order=act_order, block=block, grid="clipped")
        for block in (1, 32, 57, 128, 1000)
    ]
    for run in runs[1:]:
        assert float((run.codes != runs[0].codes).float().mean()) < 0.003
        assert _loss(weight, run, x) == pytest.approx(_loss(weight, runs[0], x), rel=0.02)


def test_the_order_of_activations_helps_where_a_few_inputs_are_loud() -> None:
    weight, x, hessian = _layer()
    format = Format(3, None)
    losses = [_loss(weight, gptq(weight, hessian, format, act_order=a, grid="clipped"), x) for a in (True, False)]
    assert losses[0] < losses[1]


def test_silent_inputs_are_rounded_to_nearest() -> None:
    weight, x, _ = _layer()
    silent = torch.arange(3, K, 11)
    x[:, silent] = 0
    format = Format(4, 32)
    ours = gptq(weight, x.t() @ x, format, grid="whole")
    assert torch.equal(ours.codes[:, silent], rtn(weight, format).codes[:, silent])
    assert _loss(weight, ours, x) < 0.6 * _loss(weight, rtn(weight, format), x)
    nothing = gptq(weight, torch.zeros(K, K), format, grid="whole")
    assert torch.equal(nothing.codes, rtn(weight, format).codes)


def test_a_hessian_of_few_samples_gets_more_damping() -> None:
    weight, x, _ = _layer()
    few = x[:5].t() @ x[:5]  # rank 5 of 160
    few -= 0.02 * few.diagonal().mean() * torch.eye(K)  # and rounded so badly that it is not even semidefinite
    few.diagonal().clamp_(min=0)
    made = factor(few)
    assert made.damping > 0.01
    assert bool(torch.isfinite(gptq(weight, made, Format(4, 32)).dequantize()).all())


def test_short_last_groups_and_one_factor_for_many() -> None:
    weight, x, hessian = _layer(k=150, n=20)
    made = factor(hessian)
    ours = gptq(weight, made, Format(4, 64))
    assert ours.scales.shape == (20, 3)
    assert torch.equal(ours.codes, gptq(weight, hessian, Format(4, 64)).codes)
    assert _loss(weight, ours, x) < 0.6 * _loss(weight, rtn(weight, Format(4, 64)), x)
    assert _loss(weight, gptq(weight, hessian, Format(4, 64), act_order=False), x) < 0.6 * _loss(
        weight, rtn(weight, Format(4, 64)), x
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w, h: (w[:, :-1], h), "over 160 inputs, the weight has 159"),
        (lambda w, h: (w, h[:-1]), "must be square"),
        (lambda w, h: (w, h * float("nan")), "Hessian holds NaN"),
        (lambda w, h: (w, -h), "negative diagonal"),
        (lambda w, h: (w.index_fill(1, torch.tensor([7]), float("inf")), h), "weight holds NaN"),
        (lambda w, h: (w, h.index_fill(0, torch.tensor([2]), 1e9)), "not positive definite"),
    ],
)
def test_bad_input_is_refused(change, says: str) -> None:  # type: ignore[no-untyped-def]
    weight, _, hessian = _layer()
    with pytest.raises(ValueError, match=says):
        gptq(*change(weight, hessian), Format(4, 32))


@pytest.mark.parametrize("act_order", [True, False])
def test_dividing_by_a_factor_is_multiplying_with_the_inverse(act_order: bool) -> None:
    weight, _, hessian = _layer()
    damped = hessian.double() + 0.05 * hessian.diagonal().mean() * torch.eye(K)
    expected = weight.double() @ torch.linalg.inv(damped)
    got = factor(hessian, act_order=act_order, damping=0.05).divide(weight)
    assert torch.allclose(got.double(), expected, atol=1e-4 * float(expected.abs().max()))


def test_an_aligned_weight_is_the_least_squares_answer() -> None:
    weight, x, _ = _layer()
    x = x.double()
    original = x + 0.2 * x @ torch.randn(K, K, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / K**0.5
    hessian, drift = (x.t() @ x / SAMPLES).float(), ((original - x).t() @ x / SAMPLES).float()
    got = aligned(weight, drift, factor(hessian, damping=1e-6))
    wanted = original @ weight.double().t()
    best = torch.linalg.lstsq(x, wanted).solution.t()
    assert torch.allclose(got.double(), best, atol=1e-3 * float(best.abs().max()))
