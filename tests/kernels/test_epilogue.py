"""What the kernels do behind the product, and gated pairs."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BARS, SERVES, Weight, name_of, product, run, sqnr_db, use

from qpass.kernels.format import KernelFormat
from qpass.kernels.plan import ACTIVATIONS
from qpass.ops.epilogue import ACTIVATIONS as MEANING

pytestmark = pytest.mark.skipif(not SERVES, reason="needs AVX2")

FORMATS = [
    KernelFormat(4, 64, "a16", 2),
    KernelFormat(4, 32, "a8-token-group", 2),
    KernelFormat(8, None, "a8-token", 4),
]
over_formats = pytest.mark.parametrize("format", FORMATS, ids=name_of)


@over_formats
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_activations(format: KernelFormat, activation: str, dtype: torch.dtype) -> None:
    use(format)
    weight, x = Weight.random(70, 100, format), torch.randn(9, 100).to(dtype)
    bias = torch.randn(70)
    expected = MEANING[activation](product(x, weight) + bias.double())
    y = run(x, weight, bias=bias, activation=ACTIVATIONS.index(activation))
    assert sqnr_db(expected, y) > BARS[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_accurate_everywhere(activation: str) -> None:
    """The weight is the identity, so that y is the activation of x itself, far into both tails."""
    format = KernelFormat(8, None, "a16", 4)
    use(format)
    k = 64
    weight = Weight(
        128 + torch.eye(k, dtype=torch.uint8), torch.ones(k, 1), torch.full((k, 1), 128, dtype=torch.uint8), format
    )
    x = torch.cat(
        [torch.linspace(-30, 30, 64 * k), torch.linspace(-0.01, 0.01, 64 * k), torch.tensor([-1e30, 1e30] * (k // 2))]
    )
    y = run(x.view(-1, k), weight, activation=ACTIVATIONS.index(activation)).view(-1).double()
    expected = MEANING[activation](x.double())
    error = (y - expected).abs()
    assert bool((error <= 1e-5 * expected.abs() + 2e-7 * x.double().abs().clamp(max=10)).all())


@over_formats
@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("half", [1, 64, 100])
def test_gated_pairs(format: KernelFormat, dtype: torch.dtype, half: int) -> None:
    use(format)
    for m in (1, 8, 40):
        weight, x = Weight.random(2 * half, 130, format, glu=True), torch.randn(m, 130).to(dtype)
        bias = torch.randn(2 * half)
        gate, up = (product(x, weight) + bias.double()).chunk(2, dim=1)
        y = run(x, weight, bias=bias, activation=ACTIVATIONS.index("silu"))
        assert y.shape == (m, half)
        assert sqnr_db(MEANING["silu"](gate) * up, y) > BARS[dtype]


@over_formats
@pytest.mark.parametrize("glu", [False, True])
def test_multiply_then_residual(format: KernelFormat, glu: bool) -> None:
    use(format)
    weight, x = Weight.random(140, 96, format, glu=glu), torch.randn(2, 5, 96)
    outputs = 70 if glu else 140
    mul, residual = torch.randn(2, 5, outputs), torch.randn(2, 5, outputs)
    y = product(x.view(10, 96), weight)
    y = y[:, :70] * y[:, 70:] if glu else y
    expected = y.view(2, 5, outputs) * mul.double() + residual.double()
    assert sqnr_db(expected, run(x, weight, mul=mul, residual=residual)) > 100
    assert sqnr_db(y.view(2, 5, outputs) + residual.double(), run(x, weight, residual=residual)) > 100
    strided = torch.randn(2, outputs, 5).transpose(1, 2)
    assert sqnr_db(y.view(2, 5, outputs) * strided.double(), run(x, weight, mul=strided)) > 100
    rows = torch.randn(2, 5, 2 * outputs)[..., outputs:]
    assert sqnr_db(y.view(2, 5, outputs) + rows.double(), run(x, weight, residual=rows)) > 100


def test_rounds_once() -> None:
    """bf16 output is the fp32 output rounded: nothing in between is."""
    format = FORMATS[0]
    use(format)
    weight, x = Weight.random(64, 128, format), torch.randn(4, 128).to(torch.bfloat16)
    mul, residual = torch.randn(4, 64).to(torch.bfloat16), torch.randn(4, 64).to(torch.bfloat16)
    kept = run(x.float(), weight, mul=mul.float(), residual=residual.float(), activation=3)
    assert sqnr_db(kept.to(torch.bfloat16), run(x, weight, mul=mul, residual=residual, activation=3)) > 70
