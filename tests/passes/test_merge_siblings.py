"""merge_siblings: linears of one input and one scheme become one; twins that must not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from qpass.passes import canonicalize, merge_siblings
from qpass.scheme import Scheme
from tests.support.capture import Body, rewrite
from tests.support.tolerance import assert_rounding_apart

LINEAR = torch.ops.qpass.linear.default
STEPS = [canonicalize, merge_siblings]
X = (torch.randn(2, 5, 64),)


def merged(function, inputs=X, scheme="w8a16", **options):
    """The names of each linear after the pass, and its count; the values are those of the capture."""
    done = rewrite(function, inputs, STEPS, scheme, **options)
    assert_rounding_apart(done.capture.run(), done.outputs())
    return [node.meta["qpass_names"] for node in done.nodes(LINEAR)], done.counts["merge_siblings"]


def body(function, **modules):
    return Body(function, **modules)


def three(bias=False):
    return {"q": nn.Linear(64, 64, bias), "k": nn.Linear(64, 32, bias), "v": nn.Linear(64, 32, bias)}


def heads(m, x):
    return [layer(x).view(2, 5, -1, 16).transpose(1, 2) for layer in (m.q, m.k, m.v)]


@pytest.mark.parametrize("bias", [False, True])
def test_q_k_v(bias):
    assert merged(body(heads, **three(bias))) == ([("q", "k", "v")], 1)


def test_a_missing_bias_among_biases():
    layers = three(bias=True) | {"k": nn.Linear(64, 32, bias=False)}
    assert merged(body(heads, **layers)) == ([("q", "k", "v")], 1)


def test_a_view_that_needs_contiguous_rows_becomes_a_reshape():
    module = body(lambda m, x: [layer(x).view(2, -1) for layer in (m.q, m.k, m.v)], **three())
    assert merged(module) == ([("q", "k", "v")], 1)


def test_conv1d_and_linear():
    module = body(
        lambda m, x: (m.a(x) - 1, m.b(x) - 2, m.c(x) - 3), a=nn.Linear(64, 32), b=Conv1D(48, 64), c=Conv1D(16, 64)
    )
    assert merged(module) == ([("a", "b", "c")], 1)


def swiglu(m, x):
    return m.down(F.silu(m.gate(x)) * m.up(x))


def gated(**more):
    return {"gate": nn.Linear(64, 128), "up": nn.Linear(64, 128), "down": nn.Linear(128, 64)} | more


def test_gate_and_up():
    assert merged(body(swiglu, **gated())) == ([("gate", "up"), ("down",)], 1)


def test_gate_comes_first_though_up_is_called_first():
    module = body(lambda m, x: m.down(m.up(x) * F.gelu(m.gate(x))), **gated())
    assert merged(module) == ([("gate", "up"), ("down",)], 1)


def test_a_gated_pair_stays_a_pair_beside_other_siblings():
    """Cohere and PaLM compute attention and the gated MLP from one normalized input."""
    module = body(lambda m, x: (*heads(m, x), swiglu(m, x)), **three(), **gated())
    assert merged(module) == ([("q", "k", "v"), ("gate", "up"), ("down",)], 2)


def test_a_linear_under_an_activation_stays_single():
    """GPT-J and Falcon: fc_in keeps its gelu in the epilogue."""
    module = body(lambda m, x: (*heads(m, x), F.gelu(m.fc(x))), **three(), fc=nn.Linear(64, 128))
    assert merged(module) == ([("q", "k", "v"), ("fc",)], 1)


def test_schemes_by_name():
    schemes = {"q": "w4a16-g32", "k": "w4a16-g32", "v": "w8a16"}
    found = merged(body(heads, **three()), scheme=lambda name, tied: Scheme.parse(schemes[name]))
    assert found == ([("q", "k"), ("v",)], 1)


def test_a_tied_head_has_its_own_scheme():
    def scheme(name, tied):
        return Scheme.parse("w8a16" if tied else "w4a16-g32")

    module = body(lambda m, ids: _both(m, m.embed(ids)), embed=nn.Embedding(40, 64), side=nn.Linear(64, 32))
    assert merged(module, (torch.tensor([1, 2, 3]),), scheme)[1] == 0


def _both(m, x):
    return F.linear(x, m.embed.weight) - 1, m.side(x) - 1


def _write_between(m, x):
    y = x * 2
    q = m.q(y)
    y.add_(1)
    return q - 1, m.k(y) - 1


def _write_to_a_result(m, x):
    q = m.q(x)
    view = q[0]
    view.add_(1)
    return q - 1, m.k(x) - 1


TWINS = {
    "other input": lambda m, x: (m.q(x) - 1, m.k(x + 1) - 1),
    "written to in between": _write_between,
    "a result that is written to": _write_to_a_result,
    "read by strides": lambda m, x: (m.q(x).as_strided((2, 2), (1, 1)) - 1, m.k(x) - 1),
    "read as another dtype": lambda m, x: (m.q(x).view(torch.int32) - 1, m.k(x) - 1),
}


@pytest.mark.parametrize("name", TWINS)
def test_twins(name):
    _, count = merged(body(TWINS[name], **three()))
    assert count == 0


def test_other_dtypes():
    module = body(lambda m, x: (m.q(x) - 1, m.k(x.bfloat16()) - 1), **(three() | {"k": nn.Linear(64, 32).bfloat16()}))
    assert merged(module)[1] == 0


def test_w16a16_is_left_alone():
    assert merged(body(heads, **three()), scheme="w16a16") == ([("q",), ("k",), ("v",)], 0)


PAIR_TWINS = {
    "the gate has another reader": lambda m, x: _gate_read_twice(m, x),
    "the product is a sum": lambda m, x: F.silu(m.gate(x)) + m.up(x),
    "up is also activated": lambda m, x: F.silu(m.gate(x)) * F.relu(m.up(x)),
}


def _gate_read_twice(m, x):
    gate = F.silu(m.gate(x))
    return gate * m.up(x), gate


@pytest.mark.parametrize("name", PAIR_TWINS)
def test_no_gated_pair(name):
    """Then the activated ones keep their own epilogues, and nothing is merged."""
    assert merged(body(PAIR_TWINS[name], **gated()))[1] == 0


def test_halves_of_different_widths_are_no_pair():
    layers = {"gate": nn.Linear(64, 128), "up": nn.Linear(64, 1)}
    assert merged(body(lambda m, x: F.silu(m.gate(x)) * m.up(x), **layers))[1] == 0


def test_values_stay_known():
    done = rewrite(body(heads, **three()), X, STEPS)
    for node in done.gm.graph.nodes:
        if node.op.startswith("call"):
            assert "example_value" in node.meta, node
    (node,) = done.nodes(LINEAR)
    assert list(node.meta["example_value"].shape) == [2, 5, 128]
    assert_rounding_apart(done.capture.run(), done.outputs())
