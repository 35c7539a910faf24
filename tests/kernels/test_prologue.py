"""What the kernels do in front of the product: normalization in fp32, one rounding (a16) or none (a8)."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BARS, SERVES, TIERS, Weight, name_of, product, run, sqnr_db, use
from torch import Tensor

from qpass.kernels.format import KernelFormat
from qpass.ops.norm import NORMS

pytestmark = pytest.mark.skipif(not SERVES, reason="needs AVX2")

FORMATS = [
    KernelFormat(4, 64, "a16", 2),
    KernelFormat(8, None, "a16", 4),
    KernelFormat(4, 32, "a8-token-group", 2),
    KernelFormat(8, None, "a8-token", 4),
]
over_formats = pytest.mark.parametrize("format", FORMATS, ids=name_of)


def normalized(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """fp64."""
    x = x.double()
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    x = x if weight is None else x * weight.double()
    return x if bias is None else x + bias.double()


@over_formats
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_norms(format: KernelFormat, norm: str, dtype: torch.dtype) -> None:
    use(format)
    for m, k, given in ((1, 100, "wb"), (9, 100, "w"), (5, 64, ""), (40, 130, "b")):
        weight = Weight.random(70, k, format)
        x = (3 * torch.randn(m, k) + 2).to(dtype)
        norm_weight = torch.rand(k) + 0.5 if "w" in given else None
        norm_bias = torch.randn(k) if "b" in given else None
        rows = normalized(x, norm, norm_weight, norm_bias, 1e-5)
        # As the op says: a16 multiplies the row rounded to x's dtype, a8 quantizes it as it is in fp32.
        expected = product(rows.to(dtype if format.rule == "a16" else torch.float32), weight)
        y = run(x, weight, norm=NORMS.index(norm), norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=1e-5)
        # An input next to a rounding boundary may fall on its other side: up to one step of int8, or of x's dtype.
        bar = min(BARS[dtype], 45.0 if format.rule != "a16" else 100.0)
        assert sqnr_db(expected, y) > bar


def test_the_epsilon_counts() -> None:
    format = FORMATS[1]
    use(format)
    weight, x = Weight.random(70, 96, format), 1e-3 * torch.randn(4, 96)
    for eps in (0.0, 1e-6, 1.0):
        expected = product(normalized(x, "rms", None, None, eps).float(), weight)
        assert sqnr_db(expected, run(x, weight, norm=1, norm_eps=eps)) > 100


@over_formats
@pytest.mark.parametrize("norm", [1, 2])
def test_a_row_depends_on_no_other(format: KernelFormat, norm: int) -> None:
    """Bit for bit, at every number of rows, next to the epilogue and in a gated pair."""
    use(format)
    weight = Weight.random(140, 130, format, glu=True)
    packed, scale = weight.packed(), torch.rand(130)
    x, residual = torch.randn(100, 130).bfloat16(), torch.randn(100, 70).bfloat16()
    prologue = {"norm": norm, "norm_weight": scale, "norm_eps": 1e-6}
    whole = run(x, weight, packed=packed, residual=residual, activation=4, **prologue)
    for begin, end in ((0, 1), (3, 5), (7, 24), (30, 100)):
        part = run(x[begin:end], weight, packed=packed, residual=residual[begin:end], activation=4, **prologue)
        assert torch.equal(whole[begin:end], part)


def test_strided_rows() -> None:
    format = FORMATS[0]
    use(format)
    weight, base = Weight.random(70, 100, format), torch.randn(4, 6, 200).bfloat16()
    for view in (base[:, :, 100:], base[::2, :, 50:150], base[:, :, ::2]):
        assert torch.equal(run(view, weight, norm=1), run(view.contiguous(), weight, norm=1))


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("norm", [0, 1])
def test_static_scale(group: int | None, norm: int) -> None:
    """One scale for all tokens; what lies beyond 127 of it is clamped."""
    format = KernelFormat(8, group, "a8-static", 4)
    use(format)
    weight, x = Weight.random(70, 130, format), torch.randn(9, 130)
    x[0, 0] = 50.0
    rows = normalized(x, "rms", None, None, 1e-6).float() if norm else x
    inverse = torch.ones(()) / torch.tensor(0.015)
    values = (rows * inverse).round().clamp(-127, 127)
    assert bool((values.abs() == 127).any())
    expected = (values.double() * float(torch.tensor(0.015))) @ weight.dense().t()
    y = run(x, weight, x_scale=0.015, norm=norm, norm_eps=1e-6 if norm else 0.0)
    assert sqnr_db(expected, y) > (45 if norm else 100)  # a normalized value on a tie may fall on its other side


@pytest.mark.parametrize("scale", [None, 0.0, -1.0, float("nan"), float("inf"), 1e-300, 1e300])
def test_a_bad_static_scale_is_refused(scale: float | None) -> None:
    format = KernelFormat(8, None, "a8-static", 4)
    use(format)
    with pytest.raises(RuntimeError, match=r"needs an x_scale|x_scale must be positive and finite"):
        run(torch.randn(2, 96), Weight.random(70, 96, format), x_scale=scale)


@pytest.mark.parametrize("norm", [1, 2])
def test_tiers_agree_in_every_bit(norm: int) -> None:
    """Sums have the same order on every instruction set, and integer products are exact."""
    format_ = KernelFormat(8, None, "a8-token", 4)
    weight, x, scale = Weight.random(70, 130, format_), torch.randn(9, 130).bfloat16(), torch.rand(130)
    results = []
    for tier in TIERS:
        use(format_, tier=tier)
        results.append(run(x, weight, norm=norm, norm_weight=scale, norm_eps=1e-6))
    assert all(torch.equal(results[0], result) for result in results)
