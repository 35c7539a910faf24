"""Int8 from one linear to the next: codes of a static scale out of the one epilogue, and as they are into the other product."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import SERVES, TIERS, Weight, name_of, product, run, sqnr_db, use

from qpass.kernels.format import KernelFormat

pytestmark = pytest.mark.skipif(not SERVES, reason="needs AVX2")

STATIC = KernelFormat(8, None, "a8-static", 4)
FORMATS = [STATIC, KernelFormat(8, None, "a8-token", 4), KernelFormat(4, 64, "a16", 2)]
BF16 = 1


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
@pytest.mark.parametrize("glu", [False, True])
def test_the_output_is_rounded_once(format: KernelFormat, glu: bool) -> None:
    """From fp32, what lies beyond 127 clamped; any format can write it, with all of its epilogue."""
    use(format)
    weight, x = Weight.random(140, 130, format, glu=glu), torch.randn(9, 130)
    residual = torch.randn(9, 70 if glu else 140)
    y = run(x, weight, activation=4, residual=residual, y_scale=0.01)
    whole = run(x, weight, activation=4, residual=residual)
    assert y.dtype == torch.int8
    assert y.abs().max() == 127
    expected = (whole * (torch.ones(()) / torch.tensor(0.01))).round().clamp(-127, 127)
    assert torch.equal(y.float(), expected)


def test_codes_are_multiplied_as_they_are() -> None:
    use(STATIC)
    weight = Weight.random(70, 130, STATIC)
    for m in (1, 9, 40):
        codes = torch.randint(-127, 128, (m, 130), dtype=torch.int8)
        y = run(codes, weight, x_scale=0.02, dtype=BF16)
        scale = float(torch.tensor(0.02))
        assert y.dtype == torch.bfloat16
        assert sqnr_db((codes.double() * scale) @ weight.dense().t(), y) > 45
        # ... which is what it makes of them itself
        assert torch.equal(run(codes.float() * 0.02, weight, x_scale=0.02), run(codes, weight, x_scale=0.02, dtype=0))


def test_from_one_to_the_next() -> None:
    """As one rounding after the other, on every tier, whatever rows go along."""
    first, second = Weight.random(140, 130, STATIC, glu=True), Weight.random(64, 70, STATIC)
    x, residual = torch.randn(30, 130).bfloat16(), torch.randn(30, 64).bfloat16()
    results = []
    for tier in TIERS:
        use(STATIC, tier=tier)

        def both(begin: int, end: int) -> torch.Tensor:
            between = run(x[begin:end], first, activation=4, y_scale=0.5)
            return run(between, second, x_scale=0.5, dtype=BF16, residual=residual[begin:end])

        results.append(both(0, 30))
        assert torch.equal(results[-1][3:9], both(3, 9))
    assert all(torch.equal(results[0], result) for result in results)
    between = run(x.float(), first, activation=4)
    assert sqnr_db(product(between, second, 0.5) + residual.double(), results[0]) > 45


def test_codes_may_lie_about_something_else_than_zero() -> None:
    """What is taken off x, and off y for the linear behind; an input that is padding stays zero."""
    formats = [STATIC, KernelFormat(4, 32, "a8-static", 2)]
    for format in formats:
        weight, x = Weight.random(70, 130, format), torch.rand(9, 130) * 5
        results = []
        for tier in TIERS:
            use(format, tier=tier)
            y = run(x, weight, x_scale=0.02, x_shift=2.5)
            results.append(y)
            assert torch.equal(y, run(x - 2.5, weight, x_scale=0.02))
            assert torch.equal(y[3:4], run(x[3:4], weight, x_scale=0.02, x_shift=2.5))
            rows = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
            normalized = run(x, weight, x_scale=0.02, x_shift=-0.5, norm=2, norm_eps=1e-5)
            assert sqnr_db(product(rows + 0.5, weight, 0.02), normalized) > 40
            codes = run(x, weight, y_scale=0.05, y_shift=-1.5)
            assert torch.equal(codes.float(), ((run(x, weight) + 1.5) * 20).round().clamp(-127, 127))
        assert all(torch.equal(results[0], result) for result in results)


def test_a_shift_comes_before_a_rotation() -> None:
    first, second = Weight.random(128, 64, STATIC), Weight.random(70, 128, STATIC)
    x = torch.rand(9, 64) * 5
    for tier in TIERS:
        use(STATIC, tier=tier)
        whole = run(x, first, x_scale=0.02, x_shift=2.5, rotate=True)
        assert torch.equal(whole, run(x - 2.5, first, x_scale=0.02, rotate=True))
        codes = run(x, first, x_scale=0.02, y_scale=0.2, y_shift=0.7, y_rotate=True)
        read = run(codes, second, x_scale=0.2, dtype=0, rotate=True, x_shift=0.7)
        assert torch.equal(read, run(run(x, first, x_scale=0.02), second, x_scale=0.2, x_shift=0.7, rotate=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": None}, "an int8 x needs a dtype"),
        ({"dtype": 3}, "unknown dtype 3; accepted: 0, 1, 2"),
        ({"x": torch.randn(2, 100)}, "dtype is for an int8 x"),
        ({"norm": 1}, "an int8 x is not normalized"),
        ({"y_scale": 0.0}, "y_scale must be positive and finite"),
        ({"y_scale": float("nan")}, "y_scale must be positive and finite"),
        ({"x_shift": float("nan")}, "x_shift and y_shift must be finite"),
        ({"y_shift": 1.0}, "y_shift goes with a y_scale"),
        ({"outliers": torch.tensor([1]), "outlier_weight": torch.zeros(1, 70).bfloat16()}, "an int8 x has no outliers"),
        ({"residual": torch.zeros(2, 70)}, "residual must have bfloat16 elements"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_bad_calls_are_refused(changes: dict[str, object], message: str) -> None:
    use(STATIC)
    given = {"x": torch.ones(2, 100, dtype=torch.int8), "x_scale": 0.1, "dtype": BF16} | changes
    with pytest.raises(RuntimeError, match=message):
        run(given.pop("x"), Weight.random(70, 100, STATIC), **given)


def test_only_static_kernels_read_codes() -> None:
    format = FORMATS[1]
    use(format)
    with pytest.raises(RuntimeError, match="takes no int8 x"):
        run(torch.ones(2, 100, dtype=torch.int8), Weight.random(70, 100, format), dtype=BF16)
    with pytest.raises(RuntimeError, match="x_shift goes with an x_scale"):
        run(torch.ones(2, 100), Weight.random(70, 100, format), x_shift=1.0)
