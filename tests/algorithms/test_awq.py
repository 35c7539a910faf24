"""AWQ on planted loud channels, and clipping on weights with outliers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpass.algorithms.awq import awq
from qpass.algorithms.clip import blocks_of, clip, fit
from qpass.algorithms.rtn import rtn
from qpass.qweight import QWeight
from qpass.scheme import Format

N, K = 64, 256
LOUD = [5, 77, 200]


def _layer(loud: float = 30.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, K, generator=g)
    x[:, LOUD] *= loud
    return torch.randn(N, K, generator=g) * 0.05, x


def _loss(weight: Tensor, found: QWeight, divisor: Tensor, x: Tensor) -> float:
    return float(((found.dequantize() / divisor - weight) @ x.t()).square().mean())


def test_planted_loud_channels_get_finer_weights() -> None:
    weight, x = _layer()
    format = Format(4, 128)
    (found,), divisor = awq([weight], x.abs().mean(0), x.t() @ x, [format], clipped=False)
    plain = rtn(weight, format)
    assert set(divisor.topk(3).indices.tolist()) == set(LOUD)
    assert _loss(weight, found, divisor, x) < 0.35 * _loss(weight, plain, torch.ones(K), x)
    errors = [(q.dequantize() / d - weight).square().mean(0) for q, d in ((found, divisor), (plain, torch.ones(K)))]
    assert bool((errors[0][LOUD] < errors[1][LOUD] / 4).all())


def test_siblings_share_a_divisor_and_may_differ_in_format() -> None:
    weight, x = _layer()
    formats = [Format(4, 64), Format(3, 128)]
    found, divisor = awq([weight, weight[:24] * 2], x.abs().mean(0), x.t() @ x, formats)
    assert [q.format for q in found] == formats
    assert divisor.shape == (K,)
    for w, q in zip((weight, weight[:24] * 2), found, strict=True):
        assert _loss(w, q, divisor, x) < 0.3 * _loss(w, rtn(w, q.format), torch.ones(K), x)


def test_even_inputs_are_left_alone() -> None:
    weight, _ = _layer()
    (found,), divisor = awq([weight], torch.ones(K), torch.eye(K), [Format(4, 64)], clipped=False, learned=False)
    assert torch.equal(divisor, torch.ones(K))
    assert torch.equal(found.codes, rtn(weight, Format(4, 64)).codes)


def test_a_silent_input_is_neither_scaled_nor_lost() -> None:
    weight, x = _layer()
    x[:, 9] = 0
    (found,), divisor = awq([weight], x.abs().mean(0), x.t() @ x, [Format(4, 64)])
    assert float(divisor[9]) == 1.0
    assert bool(torch.isfinite(found.dequantize()).all())
    assert float((found.dequantize()[:, 9] - weight[:, 9]).abs().max()) < 0.1


@pytest.mark.parametrize(
    "format",
    [Format(b, g, s, f) for b in (2, 3, 4) for g in (16, 64, None) for s, f in ((0, 0), (1, 0), (0, 1))],
    ids=str,
)
def test_clipping_never_costs_and_pays_at_few_bits(format: Format) -> None:
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(32, 200, generator=g) * 0.05
    weight[:, 3] *= 6  # outliers: the range that holds them spends its codes on them
    loss = [float((q.dequantize() - weight).square().sum()) for q in (clip(weight, format), rtn(weight, format))]
    assert loss[0] <= loss[1] * (1.0 if format.bits == 4 and format.group == 16 else 0.95)
    if format.group:
        scales, _ = fit(weight, format)
        assert torch.equal(scales.half().float(), scales)


def test_clipping_minds_what_an_error_costs() -> None:
    weight, x = _layer()
    hessian, format = x.t() @ x, Format(3, 64)
    ones = torch.ones(K)
    blind, seeing, whole = (
        _loss(weight, q, ones, x)
        for q in (
            clip(weight, format),
            clip(weight, format, hessian.diagonal()),
            clip(weight, format, blocks_of(hessian, format)),
        )
    )
    assert seeing < 0.6 * blind
    assert whole < 0.6 * blind


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w, a, h: ([w[:, 1:]], a, h), "over 256 inputs, a weight has shape"),
        (lambda w, a, h: ([], a, h), "at least one weight"),
        (lambda w, a, h: ([w], a, h[:5]), "Hessian must be"),
        (lambda w, a, h: ([w], -a, h), "amplitude holds"),
        (lambda w, a, h: ([w], a, h * float("inf")), "Hessian holds"),
        (lambda w, a, h: ([w * float("nan")], a, h), "weight holds NaN"),
    ],
)
def test_bad_input_is_refused(change, says: str) -> None:  # type: ignore[no-untyped-def]
    weight, x = _layer()
    weights, amplitude, hessian = change(weight, x.abs().mean(0), x.t() @ x)
    with pytest.raises(ValueError, match=says):
        awq(weights, amplitude, hessian, [Format(4, 64)] * len(weights))


def test_an_importance_of_another_shape_is_refused() -> None:
    weight, _ = _layer()
    with pytest.raises(ValueError, match="importance must be"):
        clip(weight, Format(4, 64), torch.ones(3, 64, 64))
