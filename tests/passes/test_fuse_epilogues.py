"""fuse_epilogues: what follows a linear goes into its epilogue, in the op's order and no other; twins that must not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from qpass.passes import canonicalize, fuse_epilogues, merge_siblings, quantize_linears
from qpass.scheme import Scheme
from tests.support.capture import Body, rewrite
from tests.support.tolerance import assert_rounding_apart, sqnr_db

QUANTIZED = torch.ops.qpass.quantized_linear.default
BEFORE = [canonicalize, merge_siblings, quantize_linears]
X = torch.randn(2, 5, 64)
Y = torch.randn(2, 5, 96)  # of the output's shape


def fused(body, *inputs, scheme="w4a16-g32", **modules):
    """What each quantized linear took, in graph order, and the pass's count; the values are those before the pass."""
    modules = {"fc": nn.Linear(64, 96), "proj": nn.Linear(96, 96)} | modules
    module, inputs = Body(body, **modules), inputs or (X, Y)
    done = rewrite(module, inputs, [*BEFORE, fuse_epilogues], scheme)
    plain = rewrite(module, inputs, BEFORE, scheme)
    assert_rounding_apart(plain.outputs(), done.outputs())
    return [node.meta["qpass_fused"] for node in done.nodes(QUANTIZED)], done.counts["fuse_epilogues"]


ACTIVATIONS = {
    "relu": (F.relu, "relu"),
    "gelu": (F.gelu, "gelu"),
    "gelu tanh": (nn.GELU("tanh"), "gelu_tanh"),
    "gelu_new": (ACT2FN["gelu_new"], "gelu_tanh"),
    "silu": (nn.SiLU(), "silu"),
    "x * sigmoid(x)": (lambda x: x * torch.sigmoid(x), "silu"),
    "in place": (lambda x: F.silu(x, inplace=True), "silu"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name):
    function, expected = ACTIVATIONS[name]
    assert fused(lambda m, x, y: function(m.fc(x))) == ([("bias", expected)], 1)


PARTS = {
    "residual": (lambda m, x, y: y + m.fc(x), ("bias", "residual")),
    "residual on the right": (lambda m, x, y: m.fc(x) + y, ("bias", "residual")),
    "residual behind a dropout": (lambda m, x, y: y + F.dropout(m.fc(x), 0.1, training=False), ("bias", "residual")),
    "residual computed after the linear": (lambda m, x, y: (lambda z: z + y.sin())(m.fc(x)), ("bias", "residual")),
    "residual in place": (lambda m, x, y: m.fc(x).add_(y), ("bias", "residual")),
    "mul": (lambda m, x, y: m.fc(x) * y, ("bias", "mul")),
    "silu, mul": (lambda m, x, y: F.silu(m.fc(x)) * y, ("bias", "silu", "mul")),
    "mul, residual": (lambda m, x, y: y + m.fc(x) * y, ("bias", "mul", "residual")),
    "relu, mul, residual": (lambda m, x, y: F.relu(m.fc(x)) * y + y.cos(), ("bias", "relu", "mul", "residual")),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts(name):
    body, expected = PARTS[name]
    assert fused(body) == ([expected], 1)


def test_without_a_bias():
    assert fused(lambda m, x, y: y + m.fc(x), fc=nn.Linear(64, 96, bias=False)) == ([("residual",)], 1)


GATED = {
    "two linears": lambda m, x: F.silu(m.gate(x)) * m.up(x),
    "up first": lambda m, x: m.up(x) * F.silu(m.gate(x)),
    "chunk": lambda m, x: _halves(m.both(x).chunk(2, dim=-1)),
    "chunk of the third dimension": lambda m, x: _halves(m.both(x).chunk(2, 2)),
    "split": lambda m, x: _halves(m.both(x).split(48, dim=-1)),
    "slices": lambda m, x: _sliced(m.both(x)),
}


def _halves(pair):
    return F.silu(pair[0]) * pair[1]


def _sliced(y):
    return F.silu(y[..., :48]) * y[..., 48:]


def glu_layers():
    return {"gate": nn.Linear(64, 48), "up": nn.Linear(64, 48), "both": nn.Linear(64, 96)}


@pytest.mark.parametrize("name", GATED)
def test_gate(name):
    assert fused(GATED[name], X, **glu_layers()) == ([("bias", "silu", "glu")], 1)


def test_gate_with_residual():
    found = fused(lambda m, x, y: y + F.gelu(m.gate(x)) * m.up(x), X, torch.randn(2, 5, 48), **glu_layers())
    assert found == ([("bias", "gelu", "glu", "residual")], 1)


def _read_twice(m, x, y):
    z = m.fc(x)
    return F.silu(z), z


def _activated_read_twice(m, x, y):
    z = F.silu(m.fc(x))
    return z * y, z


def _written(m, x, y):
    z = m.fc(x)
    view = z[0]
    w = z + y
    view.add_(1)
    return w, view


def _residual_written(m, x, y):
    r = y * 1.5
    z = m.fc(x) + r
    r.add_(1)
    return z, r


TWINS = {
    "another reader": _read_twice,
    "returned as well": lambda m, x, y: (lambda z: (z + y, z))(m.fc(x)),
    "written to through a view": _written,
    "a residual that is written to": _residual_written,
    "a cast before the activation": lambda m, x, y: F.silu(m.fc(x).double()),
    "a cast before the addition": lambda m, x, y: m.fc(x).double() + y,
    "a wider residual": lambda m, x, y: m.fc(x) + y.double(),
    "a broadcast residual": lambda m, x, y: m.fc(x) + y[:1],
    "a broadcast output": lambda m, x, y: m.fc(x[:1]) + y,
    "a number": lambda m, x, y: m.fc(x) + 1.0,
    "a scalar tensor": lambda m, x, y: m.fc(x) * y.sum(),
    "itself": lambda m, x, y: (lambda z: z + z)(m.fc(x)),
    "scaled addition": lambda m, x, y: torch.add(m.fc(x), y, alpha=2),
    "subtraction": lambda m, x, y: m.fc(x) - y,
    "another activation": lambda m, x, y: F.mish(m.fc(x)),
    "quick gelu": lambda m, x, y: ACT2FN["quick_gelu"](m.fc(x)),
    "a view in between": lambda m, x, y: m.fc(x).view(10, 96) + y.view(10, 96),
}


@pytest.mark.parametrize("name", TWINS)
def test_twins(name):
    assert fused(TWINS[name]) == ([("bias",)], 0)


PARTIAL = {
    "the activated value has another reader": (_activated_read_twice, ("bias", "silu")),
    "the product has another reader": (lambda m, x, y: (lambda z: (z + y, z))(m.fc(x) * y), ("bias", "mul")),
    "a product behind the addition": (lambda m, x, y: (m.fc(x) + y) * y.sin(), ("bias", "residual")),
    "an activation behind the addition": (lambda m, x, y: F.silu(m.fc(x) + y), ("bias", "residual")),
    "an activation behind the product": (lambda m, x, y: F.silu(m.fc(x) * y), ("bias", "mul")),
    "two additions": (lambda m, x, y: (m.fc(x) + y) + y.sin(), ("bias", "residual")),
    "two products": (lambda m, x, y: (m.fc(x) * y) * y.sin(), ("bias", "mul")),
    "two activations": (lambda m, x, y: F.relu(F.silu(m.fc(x))), ("bias", "silu")),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_what_comes_in_another_order_stays_outside(name):
    body, expected = PARTIAL[name]
    assert fused(body) == ([expected], 1)


GATE_TWINS = {
    "the gate is the second half": lambda m, x: (lambda p: p[0] * F.silu(p[1]))(m.both(x).chunk(2, -1)),
    "unequal halves": lambda m, x: (lambda p: F.silu(p[0]) * p[1][..., :32])(m.both(x).split([32, 64], -1)),
    "halves of another dimension": lambda m, x: _halves(m.both(x).chunk(2, 0)),
    "a half with another reader": lambda m, x: (lambda p: (F.silu(p[0]) * p[1], p[1]))(m.both(x).chunk(2, -1)),
    "the output with another reader": lambda m, x: (lambda z: (_halves(z.chunk(2, -1)), z))(m.both(x)),
    "three parts": lambda m, x: (lambda p: F.silu(p[0]) * p[1] - p[2])(m.both(x).chunk(3, -1)),
    "a sum of the halves": lambda m, x: (lambda p: F.silu(p[0]) + p[1])(m.both(x).chunk(2, -1)),
    "overlapping slices": lambda m, x: (lambda z: F.silu(z[..., :48]) * z[..., 40:88])(m.both(x)),
    "no activation": lambda m, x: (lambda p: p[0] * p[1])(m.both(x).chunk(2, -1)),
}


@pytest.mark.parametrize("name", GATE_TWINS)
def test_gate_twins(name):
    assert fused(GATE_TWINS[name], X, **glu_layers()) == ([("bias",)], 0)


def test_of_two_linears_in_one_addition_the_later_takes_it():
    found = fused(lambda m, x, y: m.fc(x) + m.proj(y))
    assert found == ([("bias",), ("bias", "residual")], 1)


def test_gate_and_up_of_different_schemes():
    """They are not merged: the gate takes its activation, the other the product."""
    schemes = {"gate": Scheme.parse("w8a16"), "up": Scheme.parse("w4a16-g32")}
    found = fused(lambda m, x: F.silu(m.gate(x)) * m.up(x), X, scheme=lambda name, tied: schemes[name], **glu_layers())
    assert found == ([("bias", "silu"), ("bias", "mul")], 2)


def test_a_linear_that_is_not_quantized_takes_nothing():
    done = rewrite(Body(lambda m, x: F.relu(m.fc(x)), fc=nn.Linear(64, 96)), (X,), [*BEFORE, fuse_epilogues], "w16a16")
    assert done.counts["fuse_epilogues"] == 0
    assert done.nodes(F.relu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_epilogue_rounds_once(dtype):
    """In 16 bits the fused result is closer to fp32 than the separate nodes, which round after each step."""
    module = Body(lambda m, x, y: F.silu(m.fc(x)) * y + y, fc=nn.Linear(64, 96)).to(dtype)
    inputs = (X.to(dtype), Y.to(dtype))
    (plain,) = rewrite(module, inputs, BEFORE).outputs()
    (taken,) = rewrite(module, inputs, [*BEFORE, fuse_epilogues]).outputs()
    (exact,) = rewrite(module.float(), (inputs[0].float(), inputs[1].float()), BEFORE).outputs()
    assert sqnr_db(exact, taken) > sqnr_db(exact, plain)
