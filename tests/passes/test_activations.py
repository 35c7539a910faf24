"""canonicalize, activations: calls and hand-written formulas get one spelling; look-alikes stay."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from qpass.passes import canonicalize
from qpass.passes.activations import activation_of
from tests.support.capture import rewrite
from tests.support.tolerance import assert_rounding_apart

X = (torch.randn(4, 64) * 3,)


def spelled(function, inputs=X):
    """The names of the canonical activations after canonicalize, the count, and the rest of the nodes."""
    done = rewrite(function, inputs, [canonicalize])
    assert_rounding_apart(done.capture.run(), done.outputs())
    calls = [node for node in done.gm.graph.nodes if node.op.startswith("call")]
    found = [name for node in calls if (name := activation_of(node))]
    return found, len(calls) - len(found), done.counts["canonicalize"]


CALLS = {
    "F.relu": (F.relu, "relu"),
    "nn.ReLU": (nn.ReLU(), "relu"),
    "torch.relu": (torch.relu, "relu"),
    "method relu": (lambda x: x.relu(), "relu"),
    "F.silu": (F.silu, "silu"),
    "nn.SiLU": (nn.SiLU(), "silu"),
    "F.gelu": (F.gelu, "gelu"),
    "F.gelu(approximate='none')": (lambda x: F.gelu(x, approximate="none"), "gelu"),
    "nn.GELU(tanh)": (nn.GELU("tanh"), "gelu_tanh"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    function, expected = CALLS[name]
    found, others, _ = spelled(function)
    assert (found, others) == ([expected], 0)


FAMILIES = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_activations(name):
    found, others, _ = spelled(ACT2FN[name])
    assert (found, others) == ([FAMILIES[name]], 0)


FORMULAS = {
    "x * sigmoid(x)": (lambda x: x * torch.sigmoid(x), "silu"),
    "sigmoid(x) * x": (lambda x: x.sigmoid() * x, "silu"),
    "x / (1 + exp(-x))": (lambda x: x / (1 + torch.exp(-x)), "silu"),
    "BLOOM": (lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))), "gelu_tanh"),
    "erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "gelu"),
    "erf, methods": (lambda x: x.div(math.sqrt(2.0)).erf().add(1.0).mul(0.5).mul(x), "gelu"),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name):
    function, expected = FORMULAS[name]
    found, others, count = spelled(function)
    assert (found, others) == ([expected], 0)
    assert count >= 1


def test_a_formula_over_a_sum_takes_the_sum_as_its_operand():
    found, others, _ = spelled(lambda x, y: (x + y) * torch.sigmoid(x + y) * y, (*X, torch.randn(4, 64)))
    assert found == []  # two sums, though equal: no common operand is visible
    found, others, _ = spelled(_silu_of_sum, (*X, torch.randn(4, 64)))
    assert (found, others) == (["silu"], 2)


def _silu_of_sum(x, y):
    z = x + y
    return z * torch.sigmoid(z) * y


TWINS = {
    "quick_gelu": ACT2FN["quick_gelu"],
    "gelu_10": lambda x: torch.clip(x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), -10, 10).neg(),
    "other constant": lambda x: x * 0.5 * (1.0 + torch.tanh(0.8 * (x + 0.044715 * x * x * x))),
    "other factor": lambda x: 0.4 * x * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "tanh": torch.tanh,
    "two operands": lambda x: x * torch.sigmoid(x + 1) * 1.0,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "mish": F.mish,
}


@pytest.mark.parametrize("name", TWINS)
def test_look_alikes(name):
    found, _, _ = spelled(TWINS[name])
    assert found == (["gelu"] if name == "gelu_10" else [])


def test_an_inner_value_with_another_reader_keeps_the_formula():
    def function(x):
        gate = torch.sigmoid(x)
        return x * gate, gate

    assert spelled(function) == ([], 2, 0)


def test_a_value_that_is_written_to_keeps_the_formula():
    def function(x):
        y = x + 1
        z = y * torch.sigmoid(y)
        y.add_(1)
        return z, y

    found, _, _ = spelled(function)
    assert found == []


def test_a_cast_inside_keeps_the_formula():
    found, _, _ = spelled(lambda x: x * torch.sigmoid(x.double()).float())
    assert found == []


def test_a_broadcast_keeps_the_formula():
    found, _, _ = spelled(lambda x: x[:1] * torch.sigmoid(x))
    assert found == []


def test_in_place_activation_of_a_fresh_value():
    assert spelled(lambda x: F.silu(x + 1, inplace=True)) == (["silu"], 1, 1)
    assert spelled(lambda x: (x + 1).relu_()) == (["relu"], 1, 1)


def test_in_place_activation_of_an_input_stays():
    found, _others, count = spelled(lambda x: (F.relu(x, inplace=True), x * 2))
    assert (found, count) == ([], 0)
