"""What the kernels compute, against fp64 over the same codes: every format and tier of the cases, dtypes, awkward shapes."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    A8_CASES,
    BARS,
    CASES,
    CPU,
    FORMATS,
    SERVES,
    TIERS,
    WALKS,
    Weight,
    covering,
    name_of,
    over,
    product,
    quantized,
    run,
    sqnr_db,
    use,
)

from qpass.kernels import load
from qpass.kernels.format import KernelFormat

pytestmark = pytest.mark.skipif(not SERVES, reason="needs AVX2")

SHAPES = [  # M, N, K: on the block and off it, K below a group, single outputs, more rows than one register tile
    (1, 64, 128),
    (2, 1, 20),
    (5, 130, 200),
    (6, 70, 64),
    (13, 1, 333),
    (33, 100, 391),
    (70, 65, 256),
]


@over(CASES)
def test_close_to_fp64(format: KernelFormat, tier: str) -> None:
    use(format, tier=tier)
    for m, n, k in SHAPES:
        weight = Weight.random(n, k, format)
        for dtype, bar in BARS.items():
            x = torch.randn(m, k).to(dtype)
            y = run(x, weight)
            assert y.shape == (m, n)
            assert y.dtype == dtype
            assert sqnr_db(product(x, weight), y) > bar, (m, n, k, dtype)


@over(CASES)
def test_every_row_count(format: KernelFormat, tier: str) -> None:
    """Right for M in 1..33, and row i has the same bits for every M in 1..64 however the call is walked."""
    use(format, tier=tier)
    weight = Weight.random(100, 391, format)
    packed = weight.packed()
    x = torch.randn(64, 391).to(torch.bfloat16)
    together = run(x, weight, packed=packed)
    assert sqnr_db(product(x[:33], weight), together[:33]) > 45
    for m in range(1, 64):
        assert torch.equal(run(x[:m], weight, packed=packed), together[:m]), m
    assert torch.equal(run(x[40:41], weight, packed=packed), together[40:41])
    before = load.tuning_of(format)
    try:
        for walk in WALKS:
            load.retune(format, walk)
            for m in (1, 2, 5, 23, 64):
                assert torch.equal(run(x[:m], weight, packed=packed), together[:m]), (walk, m)
    finally:
        load.retune(format, before)


@over(CASES[::7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_row_count_of_wider_dtypes(format: KernelFormat, tier: str, dtype: torch.dtype) -> None:
    use(format, tier=tier)
    weight, x = Weight.random(70, 200, format), torch.randn(64, 200).to(dtype)
    together = run(x, weight)
    for m in (1, 2, 3, 4, 5, 6, 7, 13, 21, 33, 63):
        assert torch.equal(run(x[:m], weight), together[:m]), m


@over(CASES)
def test_a_zero_point_off_by_one_is_noticed(format: KernelFormat, tier: str) -> None:
    use(format, tier=tier)
    k = 8 * (format.group or 128)  # one group of eight is wrong
    weight = Weight.random(96, k, format)
    weight.zeros.fill_(1 << (format.bits - 1))
    x = (torch.randn(9, k) + 1).to(torch.bfloat16)
    wrong = run(x, weight.with_zero_off_by_one())
    assert sqnr_db(product(x, weight), run(x, weight)) > 45
    assert sqnr_db(product(x, weight), wrong) < 40


@over(A8_CASES)
def test_the_integer_stage_is_exact(format: KernelFormat, tier: str) -> None:
    """Scales are powers of two and each token's amax is 127 in every group, so that fp32 holds every step exactly."""
    use(format, tier=tier)
    for m, n, k in SHAPES:
        weight = Weight.random(n, k, format, power_of_two=True)
        if format.group is None:
            weight.scales.fill_(2.0**-6)
        x = torch.randint(-127, 128, (m, k)).float()
        x[:, :: format.group or k] = 127.0
        values, scales = quantized(x, format, 1.0)
        assert torch.equal(values, x)
        assert bool((scales == 1).all())
        assert torch.equal(run_static(x, weight).double(), product(x, weight, 1.0)), (m, n, k)


@over(A8_CASES)
def test_the_largest_sums_are_exact(format: KernelFormat, tier: str) -> None:
    """Chains of the largest codes against +-127: nothing saturates, and K = 512 of them still fit fp32's 24 bits."""
    use(format, tier=tier)
    k, top = 512, (1 << format.bits) - 1
    groups = format.groups(k)
    for code, zero in ((top, 0), (0, top), (top, top)):
        codes = torch.full((33, k), code, dtype=torch.uint8)
        zeros = torch.full((33, groups), zero, dtype=torch.float32 if format.zero_bytes == 4 else torch.uint8)
        weight = Weight(codes, torch.ones(33, groups), zeros, format)
        signs = torch.where(torch.arange(k) % 2 == 0, 1.0, -1.0)
        x = torch.stack([torch.ones(k), -torch.ones(k), signs, signs.roll(1), signs.cumsum(0) * 2 - 1]) * 127
        reference = quantized(x, format, 1.0)[0].int() @ (codes.int() - zero).t()  # int32
        assert torch.equal(run_static(x, weight), reference.float())


def run_static(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    return run(x, weight, x_scale=1.0) if weight.format.rule == "a8-static" else run(x, weight)


@pytest.mark.parametrize("format", covering(0), ids=name_of)
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


@over([(f, tier) for f, tier in A8_CASES if tier != CPU.tier])
def test_tiers_agree_to_the_bit_on_integers(format: KernelFormat, tier: str) -> None:
    weight, x = Weight.random(130, 300, format), torch.randn(40, 300).to(torch.bfloat16)
    bias, residual = torch.randn(130), torch.randn(40, 130).to(torch.bfloat16)
    results = []
    for each in (tier, CPU.tier):
        use(format, tier=each)
        results += [run(x, weight), run(x, weight, bias=bias, residual=residual, activation=4)]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@over([next(case for case in CASES if case[1] == tier) for tier in TIERS if CPU.runs(tier)])
def test_the_environment_chooses_the_tier(format: KernelFormat, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPASS_ISA", tier)
    load.ensure(format)
    assert load._registered[format.number].target[0] == tier
    weight, x = Weight.random(70, 100, format), torch.randn(3, 100)
    y = run(x, weight)
    use(format, tier=tier)
    assert torch.equal(run(x, weight), y)


@pytest.mark.parametrize("format", covering(1), ids=name_of)
def test_rows_are_split_when_there_are_many(format: KernelFormat) -> None:
    use(format)
    weight, x = Weight.random(64, 96, format), torch.randn(2500, 96)
    y = run(x, weight)
    assert sqnr_db(product(x, weight), y) > 100
    assert torch.equal(y[2400:2401], run(x[2400:2401], weight))


@pytest.mark.parametrize(
    "format",
    [
        KernelFormat(8, None, "a8-token", 4),
        KernelFormat(4, None, "a8-static", 4),
        KernelFormat(4, 128, "a8-token-group", 2),
        KernelFormat(4, 128, "a16", 2),
    ],
    ids=name_of,
)
@pytest.mark.parametrize(("m", "k"), [(1000, 2200), (1041, 2200), (1041, 4600)])
def test_activations_that_outgrow_the_cache(format: KernelFormat, m: int, k: int) -> None:
    """Rows that are split, and blocks that share their rows; rows and segments of K that fill no tile, no task and no span."""
    use(format)
    weight = Weight.random(1100, k, format)
    x = torch.randn(m, k).to(torch.bfloat16)
    y = run_static(x, weight)
    for row in (0, 499, m // 2, m - 1):
        assert torch.equal(y[row : row + 1], run_static(x[row : row + 1], weight)), row


@pytest.mark.parametrize(
    "format", [KernelFormat(4, 64, "a16", 4), KernelFormat(8, 64, "a8-token-group", 4)], ids=name_of
)
def test_fp32_scales_of_groups(format: KernelFormat) -> None:
    use(format)
    weight, x = Weight.random(70, 300, format), torch.randn(5, 300)
    weight.scales = torch.rand_like(weight.scales) * 1e-6
    assert sqnr_db(product(x, weight), run(x, weight)) > 100


@pytest.mark.parametrize("format", [f for f in FORMATS if f.rule != "a8-static" and f.group in (None, 32)], ids=name_of)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_is_not_hidden(format: KernelFormat, value: float) -> None:
    use(format)
    weight, x = Weight.random(64, 128, format), torch.randn(3, 128)
    expected = run(x, weight)
    x[1, 5] = value
    y = run(x, weight)
    assert not torch.isfinite(y[1]).any()
    assert torch.equal(y[[0, 2]], expected[[0, 2]])
