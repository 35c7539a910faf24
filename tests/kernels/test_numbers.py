"""What the kernels compute, against fp64 over the same codes: every format, tier, dtype and awkward shape."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BARS, FORMATS, SERVES, TIERS, Weight, name_of, product, quantized, run, sqnr_db, use

from qpass.kernels.plan import KernelFormat

pytestmark = pytest.mark.skipif(not SERVES, reason="needs AVX-512 VNNI")

SHAPES = [  # M, N, K: on the block and off it, K below a group, single outputs, more rows than one register tile
    (1, 64, 128),
    (2, 1, 20),
    (5, 130, 200),
    (6, 70, 64),
    (13, 1, 333),
    (33, 100, 391),
    (70, 65, 256),
]

over_formats = pytest.mark.parametrize("format", FORMATS, ids=name_of)
over_tiers = pytest.mark.parametrize("tier", TIERS)


@over_tiers
@over_formats
def test_close_to_fp64(format: KernelFormat, tier: str) -> None:
    use(format, tier)
    for m, n, k in SHAPES:
        weight = Weight.random(n, k, format)
        for dtype, bar in BARS.items():
            x = torch.randn(m, k).to(dtype)
            y = run(x, weight)
            assert y.shape == (m, n)
            assert y.dtype == dtype
            assert sqnr_db(product(x, weight), y) > bar, (m, n, k, dtype)


@over_tiers
@over_formats
def test_a_zero_point_off_by_one_is_noticed(format: KernelFormat, tier: str) -> None:
    use(format, tier)
    k = 8 * (format.group or 128)  # one group of eight is wrong
    weight = Weight.random(96, k, format)
    weight.zeros.fill_(1 << (format.bits - 1))
    x = (torch.randn(9, k) + 1).to(torch.bfloat16)
    wrong = run(x, weight.with_zero_off_by_one())
    assert sqnr_db(product(x, weight), run(x, weight)) > 45
    assert sqnr_db(product(x, weight), wrong) < 40


@over_tiers
@pytest.mark.parametrize("format", [f for f in FORMATS if f.rule != "a16"], ids=name_of)
def test_the_integer_stage_is_exact(format: KernelFormat, tier: str) -> None:
    """Scales are powers of two and each token's amax is 127 in every group, so that fp32 holds every step exactly."""
    use(format, tier)
    for m, n, k in SHAPES:
        weight = Weight.random(n, k, format, power_of_two=True)
        if format.group is None:
            weight.scales.fill_(2.0**-6)
        x = torch.randint(-127, 128, (m, k)).float()
        x[:, :: format.group or k] = 127.0
        values, scales = quantized(x, format)
        assert torch.equal(values, x)
        assert bool((scales == 1).all())
        assert torch.equal(run(x, weight).double(), product(x, weight)), (m, n, k)


@over_tiers
@over_formats
def test_a_row_does_not_depend_on_the_others(format: KernelFormat, tier: str) -> None:
    use(format, tier)
    weight = Weight.random(100, 391, format)
    packed = weight.packed()
    x = torch.randn(33, 391).to(torch.bfloat16)
    together = run(x, weight, packed=packed)
    for m in (1, 2, 5, 6, 7, 12, 13, 20):
        assert torch.equal(run(x[:m], weight, packed=packed), together[:m]), m
    assert torch.equal(run(x[7:8], weight, packed=packed), together[7:8])


@over_formats
def test_threads_change_nothing(format: KernelFormat) -> None:
    use(format)
    weight = Weight.random(700, 520, format)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append([run(torch.ones(m, 520).cumsum(1).cos().to(torch.bfloat16), weight) for m in (1, 9, 150)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("format", [f for f in FORMATS if f.rule != "a16"], ids=name_of)
def test_tiers_agree_to_the_bit_on_integers(format: KernelFormat) -> None:
    weight, x = Weight.random(130, 300, format), torch.randn(40, 300).to(torch.bfloat16)
    results = []
    for tier in TIERS:
        use(format, tier)
        results.append(run(x, weight))
    assert torch.equal(*results)


@over_formats
def test_rows_are_split_when_there_are_many(format: KernelFormat) -> None:
    use(format)
    weight, x = Weight.random(64, 96, format), torch.randn(2500, 96)
    y = run(x, weight)
    assert sqnr_db(product(x, weight), y) > 100
    assert torch.equal(y[2400:2401], run(x[2400:2401], weight))


@pytest.mark.parametrize(
    "format", [KernelFormat(4, 64, "a16", 4), KernelFormat(8, 64, "a8-token-group", 4)], ids=name_of
)
def test_fp32_scales_of_groups(format: KernelFormat) -> None:
    use(format)
    weight, x = Weight.random(70, 300, format), torch.randn(5, 300)
    weight.scales = torch.rand_like(weight.scales) * 1e-6
    assert sqnr_db(product(x, weight), run(x, weight)) > 100


@pytest.mark.parametrize("format", [FORMATS[0], FORMATS[1], FORMATS[4]], ids=name_of)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_is_not_hidden(format: KernelFormat, value: float) -> None:
    use(format)
    weight, x = Weight.random(64, 128, format), torch.randn(3, 128)
    expected = run(x, weight)
    x[1, 5] = value
    y = run(x, weight)
    assert not torch.isfinite(y[1]).any()
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


@over_formats
def test_tokens_of_zeros_and_of_tiny_numbers(format: KernelFormat) -> None:
    use(format)
    weight = Weight.random(64, 128, format)
    assert torch.equal(run(torch.zeros(2, 128), weight), torch.zeros(2, 64))
    assert torch.isfinite(run(torch.full((2, 128), 1e-38), weight)).all()
