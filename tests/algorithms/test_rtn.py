"""Round to nearest against what it promises: half a step, exact zero, storable scales."""

from __future__ import annotations

import pytest
import torch

from qpass.algorithms.clip import clip
from qpass.algorithms.gptq import gptq
from qpass.algorithms.rtn import rtn
from qpass.qweight import QWeight, multiples
from qpass.scheme import BITS, GROUPS, Format

FORMATS = [Format(bits, group, sym) for bits in BITS for group in (None, *GROUPS) for sym in (True, False)]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_within_half_a_step(format: Format, dtype: torch.dtype) -> None:
    weight = (torch.randn(24, 200, generator=torch.Generator().manual_seed(1)) * 0.03).to(dtype)
    quantized = rtn(weight, format)
    steps = quantized.scales.repeat_interleave(quantized.group, dim=1)[:, :200]
    error = (quantized.dequantize() - weight.float()).abs() / steps
    # Half a step; an asymmetric group's end may lie another half step off, since its zero is rounded too.
    assert float(error.max()) <= (0.5 if format.symmetric else 1.0) + 1e-3
    assert int(quantized.codes.max()) <= format.max_code
    if format.symmetric:
        assert bool((quantized.zeros == 1 << (format.bits - 1)).all())


def test_zero_is_exact() -> None:
    weight = torch.randn(8, 64) + 5  # far from zero, yet zero must be a code
    weight[:, ::7] = 0
    for format in FORMATS:
        assert bool((rtn(weight, format).dequantize()[:, ::7] == 0).all())


def test_groups_of_zeros_and_denormals() -> None:
    weight = torch.zeros(4, 128)
    weight[1] = 1e-40
    weight[2, :32] = 1.0
    for format in FORMATS:
        quantized = rtn(weight, format)
        assert bool(torch.isfinite(quantized.scales).all())
        assert bool((quantized.scales > 0).all())
        assert float((quantized.dequantize() - weight).abs().max()) < 0.05


def test_grouped_scales_fit_in_float16() -> None:
    scales = rtn(torch.randn(16, 256) * 0.02, Format(4, 64)).scales
    assert torch.equal(scales.half().float(), scales)


def test_scales_outside_of_float16_stay_exact() -> None:
    weight = torch.randn(16, 256) * 1e-7
    quantized = rtn(weight, Format(4, 64))
    assert float((quantized.dequantize() - weight).norm() / weight.norm()) < 0.12


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(2, 64)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        rtn(weight, Format(4, 32))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 16), (3, 32), (2, 64)])
@pytest.mark.parametrize("algorithm", ["rtn", "clip", "gptq", "gptq in order"])
def test_integer_scales(algorithm: str, bits: int, group: int, symmetric: bool) -> None:
    """Whole multiples of one scale a row, products that are signed bytes, and hardly more error for it."""
    torch.manual_seed(0)
    weight = torch.randn(60, 300) * torch.rand(60, 1) * torch.exp(0.3 * torch.randn(300))
    weight[3], weight[5, :group], weight[7, :group] = 0, 0, weight[7, :group].abs() * 20
    x = torch.randn(900, 300)
    hessian = x.t() @ x

    def found(format: Format) -> QWeight:
        if algorithm in ("rtn", "clip"):
            return {"rtn": rtn, "clip": clip}[algorithm](weight, format)
        return gptq(weight, hessian, format, act_order=algorithm == "gptq")

    result, plain = found(Format(bits, group, symmetric, integer_scales=True)), found(Format(bits, group, symmetric))
    times, own = multiples(result.scales, result.zeros, bits)  # raises where they are none
    assert torch.equal(times.float() * own, result.scales)
    assert times.max() > 5
    assert torch.equal(result.dequantize()[3], torch.zeros(300))
    assert (
        (result.codes.int() - result.zeros.int().repeat_interleave(group, 1)[:, :300])
        * times.repeat_interleave(group, 1)[:, :300]
    ).abs().max() <= 127
    rows = [i for i in range(60) if i not in (3, 7)]

    def cost(q: QWeight) -> float:
        error = (q.dequantize() - weight)[rows]
        return float(((error @ hessian) * error).sum())

    assert cost(result) < 1.2 * cost(plain)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (2, 16), (8, None)])
def test_float_zeros_reach_both_ends_of_a_range_without_zero(bits, group):
    """A range of [2, 3] costs integer zeros most of their codes; d * code + m spends all of them on it."""
    weight = 2 + torch.rand(5, 96)
    loose, exact = rtn(weight, Format(bits, group)), rtn(weight, Format(bits, group, float_zeros=True))
    assert exact.zeros.dtype == torch.float32
    assert exact.codes.min() == 0
    assert exact.codes.max() == (1 << bits) - 1
    errors = [(q.dequantize() - weight).abs().max() for q in (exact, loose)]
    assert errors[0] < 0.52 * exact.scales.max()  # half a step, and what fp32 rounds away at zeros of several steps
    assert errors[0] < 0.6 * errors[1]
