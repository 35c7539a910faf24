"""Rotation by 64s in front of int8, and behind an epilogue that writes int8: the Hadamard matrix over its root."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BARS, SERVES, TIERS, Weight, name_of, product, run, sqnr_db, use

from qpass.kernels.format import KernelFormat
from qpass.qactivation import rotated

pytestmark = pytest.mark.skipif(not SERVES, reason="needs AVX2")

STATIC = KernelFormat(8, None, "a8-static", 4)
FORMATS = [STATIC, KernelFormat(8, None, "a8-token", 4), KernelFormat(4, 32, "a8-token-group", 2)]
over_formats = pytest.mark.parametrize("format", FORMATS, ids=name_of)


def test_the_matrix_is_orthonormal_and_its_own_inverse() -> None:
    x = torch.randn(3, 192, dtype=torch.float64).float()
    assert torch.allclose(rotated(rotated(x)), x, atol=1e-5)
    assert torch.allclose(rotated(x).square().sum(-1), x.square().sum(-1), rtol=1e-5)
    one = rotated(torch.eye(64)[:1])
    assert torch.equal(one.abs(), torch.full((1, 64), 0.125))


@over_formats
@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("norm", [0, 1])
def test_x_is_rotated_before_it_is_quantized(format: KernelFormat, dtype: torch.dtype, norm: int) -> None:
    use(format)
    for m, k in ((1, 64), (5, 192), (33, 320)):
        weight, x = Weight.random(70, k, format), torch.randn(m, k).to(dtype)
        x[:, 3] = 20.0
        rows = x.float()
        if norm:
            rows = rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        y = run(x, weight, rotate=True, norm=norm, norm_eps=1e-6 if norm else 0.0)
        # a value next to a rounding boundary may fall on its other side: sums are in another order here
        assert sqnr_db(product(rotated(rows), weight), y) > 40


@over_formats
def test_rows_and_tiers_agree_in_every_bit(format: KernelFormat) -> None:
    weight, x = Weight.random(140, 256, format, glu=True), torch.randn(40, 256).bfloat16()
    results = []
    for tier in TIERS:
        use(format, tier=tier)
        results.append(run(x, weight, rotate=True, activation=4))
        assert torch.equal(results[-1][5:9], run(x[5:9], weight, rotate=True, activation=4))
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("glu", [False, True])
def test_y_is_rotated_for_the_linear_behind(glu: bool) -> None:
    """What it would be rotated to as that linear reads it, were it not rounded in between."""
    weight, second = Weight.random(256, 130, STATIC, glu=glu), Weight.random(70, 128 if glu else 256, STATIC)
    x = torch.randn(9, 130)
    results = []
    for tier in TIERS:
        use(STATIC, tier=tier)
        whole = run(x, weight, activation=4)
        codes = run(x, weight, activation=4, y_scale=0.2, y_rotate=True)
        expected = (rotated(whole) / 0.2).round().clamp(-127, 127)
        assert (codes.float() - expected).abs().max() <= 1  # ties
        assert sqnr_db(expected, codes.float()) > 45
        results.append(run(codes, second, x_scale=0.2, dtype=0, rotate=True))
        assert torch.equal(results[-1], run(whole, second, x_scale=0.2, rotate=True))
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize(
    ("k", "changes", "message"),
    [
        (100, {"rotate": True}, "rotated inputs come in 64s, at most 32768, not 100"),
        (128, {"y_rotate": True}, "y_rotate needs a y_scale"),
        (128, {"y_rotate": True, "y_scale": 0.1}, "rotated outputs come in 64s, not 70"),
        (
            128,
            {"rotate": True, "outliers": torch.tensor([1]), "outlier_weight": torch.zeros(1, 70)},
            "no outliers, nor has one that is rotated",
        ),
    ],
)
def test_bad_rotations_are_refused(k: int, changes: dict[str, object], message: str) -> None:
    use(STATIC)
    with pytest.raises(RuntimeError, match=message):
        run(torch.randn(2, k), Weight.random(70, k, STATIC), **changes)


def test_sixteen_bits_are_not_rotated() -> None:
    format = KernelFormat(8, None, "a16", 4)
    use(format)
    with pytest.raises(RuntimeError, match="16-bit activations, which are not rotated"):
        run(torch.randn(2, 128), Weight.random(70, 128, format), rotate=True)
