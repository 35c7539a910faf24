"""Inputs that int8 doesn't get (LLM.int8): zeros in what is quantized, multiplied by their columns in fp32, in the same call."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BARS, SERVES, TIERS, Weight, name_of, product, run, sqnr_db, use
from torch import Tensor

from qpass.kernels.format import KernelFormat

pytestmark = pytest.mark.skipif(not SERVES, reason="needs AVX2")

FORMATS = [
    KernelFormat(8, None, "a8-token", 4),
    KernelFormat(8, None, "a8-static", 4),
    KernelFormat(4, 32, "a8-token-group", 2),
]
over_formats = pytest.mark.parametrize("format", FORMATS, ids=name_of)
FEW = torch.tensor([0, 3, 17, 64, 99])


def columns(count: int, outputs: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, outputs).to(dtype)


@over_formats
@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("glu", [False, True])
def test_outliers_are_exact(format: KernelFormat, dtype: torch.dtype, glu: bool) -> None:
    """Whatever their size: int8 never sees them."""
    use(format)
    for m, n in ((1, 70), (4, 128), (9, 66)):
        weight = Weight.random(n, 100, format, glu=glu)
        x = torch.randn(m, 100).to(dtype)
        x[:, FEW] *= 20
        few, bias = columns(len(FEW), n, dtype), torch.randn(n)
        y = run(x, weight, outliers=FEW, outlier_weight=few, bias=bias)
        rest = x.index_fill(1, FEW, 0.0)
        expected = product(rest, weight) + x[:, FEW].double() @ few.double() + bias
        if glu:
            expected = expected[:, : n // 2] * expected[:, n // 2 :]
        assert sqnr_db(expected, y) > BARS[dtype]


@over_formats
def test_they_are_normalized_with_the_rest(format: KernelFormat) -> None:
    """They count in the norm, and are multiplied as it gives them."""
    use(format)
    weight, x, few = Weight.random(70, 100, format), torch.randn(5, 100), columns(len(FEW), 70, torch.float32)
    x[:, FEW] *= 100
    scale = torch.rand(100) + 0.5
    rows = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale
    y = run(x, weight, norm=1, norm_weight=scale, norm_eps=1e-5, outliers=FEW, outlier_weight=few)
    expected = product(rows.index_fill(1, FEW, 0.0), weight) + rows[:, FEW].double() @ few.double()
    assert sqnr_db(expected, y) > 45  # a normalized value on a tie may fall on its other side


@over_formats
def test_a_row_depends_on_no_other(format: KernelFormat) -> None:
    """Bit for bit, though rows share the read of the outliers' columns by fours; and on every tier."""
    weight, x = Weight.random(140, 130, format, glu=True), torch.randn(100, 130).bfloat16()
    index = torch.arange(0, 130, 7)
    given = {"outliers": index, "outlier_weight": columns(len(index), 140, torch.bfloat16)}
    results = []
    for tier in TIERS:
        use(format, tier=tier)
        results.append(run(x, weight, activation=4, **given))
        for begin, end in ((0, 1), (3, 5), (7, 24), (30, 100)):
            assert torch.equal(results[-1][begin:end], run(x[begin:end], weight, activation=4, **given))
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outliers": None}, "come together"),
        ({"outlier_weight": None}, "come together"),
        ({"outliers": torch.tensor([3, 100])}, "ascend within 0 to 99; number 1 is 100"),
        ({"outliers": torch.tensor([-1, 3])}, "ascend within 0 to 99; number 0 is -1"),
        ({"outliers": torch.tensor([3, 3])}, "ascend within 0 to 99; number 1 is 3"),
        ({"outliers": torch.tensor([3, 4], dtype=torch.int32)}, "int64"),
        ({"outliers": torch.tensor([[3, 4]])}, "one-dimensional"),
        ({"outliers": torch.tensor([1, 2, 3, 4])[::2]}, "contiguous"),
        ({"outlier_weight": torch.zeros(2, 69)}, "outlier_weight has shape .2, 69.; 2 outliers and 70 outputs"),
        ({"outlier_weight": torch.zeros(3, 70)}, "outlier_weight has shape"),
        ({"outlier_weight": torch.zeros(2, 70).bfloat16()}, "of x's dtype"),
        ({"outlier_weight": torch.zeros(140)}, "two-dimensional"),
        ({"outlier_weight": torch.zeros(70, 2).t()}, "contiguous"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_bad_outliers_are_refused(changes: dict[str, object], message: str) -> None:
    use(FORMATS[0])
    given = {"outliers": torch.tensor([3, 4]), "outlier_weight": torch.zeros(2, 70)}
    with pytest.raises(RuntimeError, match=message):
        run(torch.randn(2, 100), Weight.random(70, 100, FORMATS[0]), **(given | changes))


def test_sixteen_bits_have_none() -> None:
    format = KernelFormat(8, None, "a16", 4)
    use(format)
    with pytest.raises(RuntimeError, match="has 16-bit activations, and no outliers"):
        run(torch.randn(2, 100), Weight.random(70, 100, format), outliers=FEW, outlier_weight=torch.zeros(5, 70))
