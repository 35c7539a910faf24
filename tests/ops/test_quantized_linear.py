"""The op's plain-torch meaning against fp64, spelled out a second time."""

from __future__ import annotations

import pytest
import torch

import qpass.ops  # noqa: F401
from qpass.algorithms.rtn import rtn
from qpass.scheme import Scheme
from tests.support.tolerance import sqnr_db


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


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_in_front(norm: str, dtype: torch.dtype) -> None:
    """a16 multiplies the normalized row rounded once to x's dtype; a8 quantizes it unrounded."""
    torch.manual_seed(0)
    x, weight, scale, shift = (
        (4 * torch.randn(3, 64) + 1).to(dtype),
        torch.randn(32, 64),
        torch.rand(64),
        torch.randn(64),
    )
    rows = x.float() - (x.float().mean(-1, keepdim=True) if norm == "layer" else 0)
    rows = rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale + shift
    prologue = {"norm": norm, "norm_weight": scale, "norm_bias": shift, "norm_eps": 1e-5}
    for name in ("w8a16", "w4a8-g32"):
        scheme = Scheme.parse(name)
        y = run(x, weight, scheme, **prologue)
        assert y.dtype == dtype
        if name == "w8a16":
            expected = run(rows.to(dtype), weight, scheme)
            assert sqnr_db(expected, y) > (110 if dtype == torch.float32 else 40)
        else:
            expected = run(rows, weight, scheme)
            # An int8 value on a tie may fall on either side, one step of 127 in some of 64 inputs; bf16 output rounds.
            assert sqnr_db(expected, y) > 40
    with pytest.raises(ValueError, match="unknown norm 'batch'; accepted: none, rms, layer"):
        run(x, weight, scheme, norm="batch")


def test_static_activations() -> None:
    torch.manual_seed(0)
    x, scheme = torch.randn(5, 64), Scheme.parse("w8a8-dynamic")
    assert scheme.weight is not None
    q = rtn(torch.randn(32, 64), scheme.weight)

    def static(x: torch.Tensor, rule: str = "a8-static", **arguments: object) -> torch.Tensor:
        return torch.ops.qpass.quantized_linear(x, q.codes, q.scales, q.zeros, None, 8, 0, rule, **arguments)

    values = (x.double() / 0.02).round().clamp(-127, 127) * 0.02
    assert bool((x.abs() > 0.02 * 127).any())  # some are clamped
    assert torch.allclose(static(x, x_scale=0.02).double(), values @ q.dequantize().double().t(), atol=1e-4)
    assert torch.allclose(static(x, x_scale=0.02)[:1], static(x[:1], x_scale=0.02), atol=1e-5)
    shifted = ((x.double() - 1.5) / 0.02).round().clamp(-127, 127) * 0.02
    assert torch.allclose(
        static(x, x_scale=0.02, x_shift=1.5).double(), shifted @ q.dequantize().double().t(), atol=1e-4
    )
    for rule, scale, shift in (("a8-static", 0.1, float("nan")), ("a8-token", None, 1.0)):
        with pytest.raises(ValueError, match="x_shift must be finite, and zero unless the rule is 'a8-static'"):
            static(x, rule, x_scale=scale, x_shift=shift)
    for rule, scale, message in (
        ("a8-static", None, "takes one x_scale"),
        ("a16", 0.1, "takes no x_scale"),
        ("a8-static", 0.0, "positive and finite"),
        ("a8-static", float("inf"), "positive and finite"),
        ("a8-static", float("nan"), "positive and finite"),
    ):
        with pytest.raises(ValueError, match=message):
            static(x, rule, x_scale=scale)
