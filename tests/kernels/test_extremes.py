"""Extreme values, made up by hypothesis: every element within the error that fp32 arithmetic allows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, CPU, SERVES, WALKS, Weight, by_int8, over, product, quantized, run, use
from torch import Tensor

from qpass.kernels import load
from qpass.kernels.format import KernelFormat

pytestmark = pytest.mark.skipif(not SERVES, reason="needs AVX2")

INPUTS = ("normal", "zeros", "denormal", "+-127", "hot channel", "huge", "one of each")
CODES = ("random", "largest", "zeros")
UNIT = 2.0**-24
"""Half of the distance between 1 and the next fp32."""

TINY = 1e-34
"""Inputs below 1e-35 count as zeros with int8 activations; vdpbf16ps takes denormals (1.2e-38) for zeros."""

OF_TIERS = [
    case
    for i, case in enumerate(CASES)
    if case[0].group in (None, 16, 64) and (case[1] != CPU.tier or case[0].rule != "a8-static") and i % 3 == 0
]


@dataclass(frozen=True)
class Draw:
    m: int
    n: int
    k: int
    x: str
    codes: str
    zero: float  # of the largest code
    seed: int


draws = st.builds(
    Draw,
    m=st.integers(1, 33),
    n=st.integers(1, 130),
    k=st.integers(1, 300),
    x=st.sampled_from(INPUTS),
    codes=st.sampled_from(CODES),
    zero=st.sampled_from((0.0, 0.5, 1.0)),
    seed=st.integers(0, 1 << 16),
)


def inputs(draw: Draw, kind: str) -> Tensor:
    m, k = draw.m, draw.k
    if kind == "one of each":
        kinds = [INPUTS[i % 6] for i in range(m)]
        return torch.cat([inputs(Draw(1, 1, k, "", "", 0, 0), each) for each in kinds])
    x = torch.randn(m, k)
    if kind == "zeros":
        return x * 0
    if kind == "denormal":
        return x * 1e-39
    if kind == "+-127":
        return torch.where(x > 0, 127.0, -127.0)
    if kind == "hot channel":
        x[:, torch.randint(0, k, ())] *= 1000
    return x * 1e30 if kind == "huge" else x


DIGITS = 8225000
"""What a token's largest fp32 input becomes where 16-bit activations are int8 terms (``cpp/prologue.h``)."""


def error_bound(x: Tensor, weight: Weight, tier: str) -> Tensor:
    """[M, N]: what rounding to fp32 in any order allows, standard analysis (Higham, section 3.1), dtype's own apart.

    a16: a group's L products, two roundings each at most, of inputs times centered codes; as many of its sum of inputs
    times (zero - center); three more in the fold. a8: the sums are exact, their conversion and the fold round. Then
    one for each group that a total goes through, and five for split inputs, the token's scale and the bias. a16 by int8
    terms: as a8, three digits of up to 127 each, and half a step of the last digit an input.
    """
    k, format = weight.shape[1], weight.format
    length = format.group or k
    groups = -(-k // length)
    middle = (1 << (format.bits - 1)) - 0.5  # centers are this or half a code above
    zeros, scales = (t.double().repeat_interleave(length, 1)[:, :k] for t in (weight.zeros, weight.scales))
    codes = weight.codes.double()
    if by_int8(format, tier):
        magnitudes, step = (codes - zeros).abs() * scales, x.double().abs().amax(1, keepdim=True) / DIGITS
        digits = x.double().abs() + 128 * 254 * step  # of the second and third, which may be larger than the input
        rounding = (groups + 12) * UNIT * (digits @ magnitudes.t())
        return rounding + 0.501 * step * magnitudes.sum(1) + TINY * 1e4 * magnitudes.sum(1)
    if format.rule == "a16":
        magnitudes = ((codes - middle).abs() + (zeros - middle).abs() + 1) * scales
        return (2 * length + groups + 8) * UNIT * (x.double().abs() @ magnitudes.t()) + TINY * magnitudes.sum(1)
    values, x_scales = quantized(x, format)
    magnitudes = (codes - zeros).abs() * scales
    rounding = (groups + 8) * UNIT * ((values.double().abs() * x_scales.double()) @ magnitudes.t())
    return rounding + TINY * magnitudes.sum(1)


@over(OF_TIERS)
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(draw=draws)
def test_every_element_is_within_its_bound(format: KernelFormat, tier: str, draw: Draw) -> None:
    use(format, tier=tier)
    torch.manual_seed(draw.seed)
    weight = Weight.random(draw.n, draw.k, format)
    top = (1 << format.bits) - 1
    if draw.codes != "random":
        weight.codes.fill_(top if draw.codes == "largest" else 0)
    weight.zeros.fill_(int(draw.zero * top))
    x = inputs(draw, draw.x)
    y = run(x, weight)
    assert torch.isfinite(y).all()
    error = (y.double() - product(x, weight)).abs()
    assert bool((error <= error_bound(x, weight, tier)).all()), float((error / error_bound(x, weight, tier)).max())
    last = x[-1:].to(torch.bfloat16)
    assert torch.equal(run(last, weight), run(x.to(torch.bfloat16), weight)[-1:])


@over(OF_TIERS)
def test_tokens_of_zeros_and_of_tiny_numbers(format: KernelFormat, tier: str) -> None:
    use(format, tier=tier)
    weight = Weight.random(64, 128, format)
    assert torch.equal(run(torch.zeros(2, 128), weight), torch.zeros(2, 64))
    assert torch.isfinite(run(torch.full((2, 128), 1e-38), weight)).all()


@over([(f, tier) for f, tier in OF_TIERS if f.bits < 8 and f.zero_bytes == 1 and not f.integer_scales])
def test_zeros_far_from_the_codes(format: KernelFormat, tier: str) -> None:
    """A zero has eight bits whatever its codes have: tiles take signed codes less their zero, and 15 - 255 is none."""
    use(format, tier=tier)
    weight, x = Weight.random(70, 200, format), torch.randn(20, 200)
    weight.zeros = torch.randint(0, 256, weight.zeros.shape, dtype=torch.uint8)
    for walk in WALKS:
        load.retune(format, walk)
        error = (run(x, weight).double() - product(x, weight)).abs()
        assert bool((error <= error_bound(x, weight, tier)).all()), walk
