"""The op's plain-torch meaning against fp64, spelled out a second time."""

from __future__ import annotations

import pytest
import torch

import qpass.ops  # noqa: F401
from qpass.algorithms.rtn import rtn
from qpass.scheme import Scheme


def run(
    x: torch.Tensor, weight: torch.Tensor, scheme: Scheme, bias: torch.Tensor | None = None, **epilogue: object
) -> torch.Tensor:
    assert scheme.weight is not None
    q = rtn(weight, scheme.weight)
    return torch.ops.qpass.quantized_linear(
        x, q.codes, q.scales, q.zeros, bias, scheme.weight.bits, scheme.weight.group or 0, scheme.activation, **epilogue
    )


@pytest.mark.parametrize("name", ["w8a16", "w4a16-g32", "w4a8-g32", "w8a8-dynamic"])
def test_against_fp64(name: str) -> None:
    torch.manual_seed(0)
    scheme = Scheme.parse(name)
    assert scheme.weight is not None
    x, weight, bias = torch.randn(2, 3, 80), torch.randn(24, 80), torch.randn(24)
    dense = rtn(weight, scheme.weight).dequantize().double()
    rows = x.double()
    if scheme.activation != "a16":
        parts = []
        for start in range(0, 80, scheme.weight.group or 80):
            part = rows[..., start : start + (scheme.weight.group or 80)]
            scale = part.abs().amax(-1, keepdim=True) / 127
            parts.append((part / scale).round() * scale)
        rows = torch.cat(parts, -1)
    expected = rows @ dense.t() + bias.double()
    assert torch.allclose(run(x, weight, scheme, bias).double(), expected, atol=2e-4, rtol=1e-5)


def test_epilogue_order() -> None:
    torch.manual_seed(0)
    scheme = Scheme.parse("w8a16")
    x, weight, bias = torch.randn(3, 64), torch.randn(32, 64), torch.randn(32)
    mul, residual = torch.randn(3, 16), torch.randn(3, 16)
    y = run(x, weight, scheme, bias)
    expected = torch.nn.functional.silu(y[:, :16]) * y[:, 16:] * mul + residual
    assert torch.allclose(
        run(x, weight, scheme, bias, activation="silu", glu=True, mul=mul, residual=residual), expected, atol=1e-5
    )


def test_rows_are_independent() -> None:
    """A hot token may not change its neighbours: scales are per token."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 64), torch.randn(32, 64)
    hot = x.clone()
    hot[0] *= 1000
    for name in ("w8a8-dynamic", "w4a8-g32"):
        scheme = Scheme.parse(name)
        assert torch.allclose(run(x, weight, scheme)[1:], run(hot, weight, scheme)[1:], atol=1e-5)


def test_zeros_and_unknown_activation() -> None:
    scheme = Scheme.parse("w4a8-g32")
    assert bool((run(torch.zeros(2, 64), torch.randn(8, 64), scheme) == 0).all())
    with pytest.raises(ValueError, match="unknown activation 'swish'; accepted: none, relu"):
        run(torch.zeros(2, 64), torch.randn(8, 64), scheme, activation="swish")
