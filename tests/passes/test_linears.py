"""canonicalize, linears: every way to write one becomes qpass.linear; its twins stay, with a reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from qpass.errors import UnsupportedError
from qpass.passes import canonicalize
from tests.support.capture import Body, rewrite
from tests.support.tolerance import assert_rounding_apart

LINEAR = torch.ops.qpass.linear.default
N, K = 48, 32


def weight(rows=N, columns=K, dtype=torch.float32):
    return nn.Parameter(torch.randn(rows, columns, dtype=dtype))


def vector(size=N):
    return nn.Parameter(torch.randn(size))


def body(function, **parameters):
    return Body(function, **parameters)


X = (torch.randn(2, 5, K),)
ROWS = (torch.randn(6, K),)

SPELLINGS = {
    "nn.Linear": (nn.Linear(K, N), X),
    "nn.Linear without bias": (nn.Linear(K, N, bias=False), X),
    "one row": (nn.Linear(K, N), (torch.randn(K),)),
    "F.linear by name": (body(lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), w=weight(), b=vector()), X),
    "matmul of T": (body(lambda m, x: x @ m.w.T, w=weight()), X),
    "matmul of mT": (body(lambda m, x: x @ m.w.mT, w=weight()), X),
    "torch.matmul of t()": (body(lambda m, x: torch.matmul(x, m.w.t()), w=weight()), X),
    "method matmul of transpose": (body(lambda m, x: x.matmul(m.w.transpose(0, 1)), w=weight()), X),
    "method matmul of transpose(-2, -1)": (body(lambda m, x: x.matmul(m.w.transpose(-2, -1)), w=weight()), X),
    "method matmul of permute": (body(lambda m, x: x.matmul(m.w.permute(1, 0)), w=weight()), X),
    "matmul of [K, N]": (body(lambda m, x: x @ m.w, w=weight(K, N)), X),
    "matmul of t().t()": (body(lambda m, x: x @ m.w.t().t(), w=weight(K, N)), X),
    "torch.mm": (body(lambda m, x: torch.mm(x, m.w.t()), w=weight()), ROWS),
    "method mm": (body(lambda m, x: x.mm(m.w), w=weight(K, N)), ROWS),
    "addmm of [K, N]": (body(lambda m, x: torch.addmm(m.b, x, m.w), w=weight(K, N), b=vector()), ROWS),
    "addmm of t()": (body(lambda m, x: torch.addmm(m.b, x, m.w.t()), w=weight(), b=vector()), ROWS),
    "Conv1D": (Conv1D(N, K), X),
    "Falcon: matmul of T, then a bias": (body(lambda m, x: x @ m.w.T + m.b, w=weight(), b=vector()), X),
    "a bias in front": (body(lambda m, x: m.b + F.linear(x, m.w), w=weight(), b=vector()), X),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_spelling(name):
    module, inputs = SPELLINGS[name]
    done = rewrite(module, inputs, [canonicalize])
    (node,) = done.nodes(LINEAR)
    assert done.ctx.left == {}
    # What is left is the linear alone, with the transpose of its Parameter where that is [K, N].
    others = [n for n in done.gm.graph.nodes if n.op.startswith("call") and n is not node and n.target is not torch.t]
    assert others == []
    wants_bias = any(p.dim() == 1 for p in module.parameters())
    assert (node.args[2][0] is not None) == wants_bias
    assert_rounding_apart(done.capture.run(), done.outputs())


def test_conv1d_loses_its_views_and_keeps_its_shape():
    done = rewrite(Conv1D(N, K), (torch.randn(2, 5, K),), [canonicalize])
    (node,) = done.nodes(LINEAR)
    assert done.counts == {"canonicalize": 2}  # the addmm, and the views around it
    assert list(node.meta["example_value"].shape) == [2, 5, N]
    assert node.args[0].op == "placeholder"


TWINS = {
    "weight computed in the graph": (
        body(lambda m, x: F.linear(x, m.w * 2), w=weight()),
        X,
        "its weight is computed in the graph",
    ),
    "weight is an input": (
        body(lambda m, x, w: F.linear(x, w)),
        (*X, torch.randn(N, K)),
        "its weight is an input of the graph",
    ),
    "weight is written to": (
        body(lambda m, x: F.linear(x, m.w.add_(1)), w=weight().requires_grad_(False)),
        X,
        "its weight is",
    ),
    "weight is written to through a view": (
        body(lambda m, x: (m.w[0].zero_(), F.linear(x, m.w))[1], w=weight().requires_grad_(False)),
        X,
        "its weight is written to in the graph",
    ),
    "vector": (body(lambda m, x: F.linear(x, m.w), w=vector(K)), X, "its weight has shape [32]; a matrix is needed"),
    "experts": (
        body(lambda m, x: torch.bmm(x, m.w), w=nn.Parameter(torch.randn(2, K, N))),
        X,
        "3-D expert weights stay in float32",
    ),
    "on the left": (
        body(lambda m, x: m.w @ x, w=weight(N, 6)),
        ROWS,
        "its weight stands on the left of the product",
    ),
    "in a vmap": (
        body(lambda m, x: torch.vmap(lambda row: F.linear(row, m.w))(x), w=weight()),
        X,
        "its shapes are unknown, as inside torch.vmap",
    ),
    "in a nested graph": (
        body(lambda m, x: checkpoint(lambda y: F.linear(y, m.w), x, use_reentrant=False), w=weight()),
        X,
        "its linears are inside a nested graph",
    ),
    "one expert": (
        body(lambda m, x: F.linear(x, m.w[1]), w=nn.Parameter(torch.randn(2, N, K))),
        X,
        "its weight is computed in the graph",
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_left_with_a_reason(name):
    module, inputs, reason = TWINS[name]
    done = rewrite(module, inputs, [canonicalize])
    assert done.nodes(LINEAR) == []
    assert done.counts == {"canonicalize": 0}
    assert any(reason in sentence for sentence in done.ctx.left.values()), done.ctx.left


def test_another_dtype_is_left_unless_it_was_asked_for():
    module, inputs = nn.Linear(K, N).double(), (X[0].double(),)
    done = rewrite(module, inputs, [canonicalize], scheme="w16a16")
    assert done.nodes(LINEAR) == []
    assert done.ctx.left == {"weight": "its weight is float64; served are bfloat16, float16, float32"}
    with pytest.raises(UnsupportedError, match="float64"):
        rewrite(module, inputs, [canonicalize])


def test_autocast_is_left():
    def run(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, m.w)

    done = rewrite(body(run, w=weight()), X, [canonicalize])
    assert done.nodes(LINEAR) == []
    assert "autocast" in done.ctx.left["w"]


SILENT_TWINS = {
    "product of activations": (body(lambda m, x, y: x @ y), (*X, torch.randn(2, K, 7))),
    "scaled addmm": (body(lambda m, x: torch.addmm(m.b, x, m.w, beta=2), w=weight(K, N), b=vector()), ROWS),
}


@pytest.mark.parametrize("name", SILENT_TWINS)
def test_no_linear(name):
    module, inputs = SILENT_TWINS[name]
    done = rewrite(module, inputs, [canonicalize])
    assert done.nodes(LINEAR) == []
    assert done.counts == {"canonicalize": 0}


BIASES = {
    "computed": (body(lambda m, x: F.linear(x, m.w, m.b * 2), w=weight(), b=vector()), X),
    "an input": (body(lambda m, x, b: F.linear(x, m.w, b), w=weight()), (*X, torch.randn(N))),
    "a matrix": (body(lambda m, x: torch.addmm(m.b, x, m.w), w=weight(K, N), b=weight(6, N)), ROWS),
    "written to": (
        body(lambda m, x: F.linear(x, m.w, m.b.add_(1)), w=weight(), b=vector().requires_grad_(False)),
        X,
    ),
}


@pytest.mark.parametrize("name", BIASES)
def test_other_biases_become_an_addition(name):
    module, inputs = BIASES[name]
    state = {key: value.clone() for key, value in module.state_dict().items()}
    done = rewrite(module, inputs, [canonicalize])
    (node,) = done.nodes(LINEAR)
    assert node.args[2] == [None]
    module.load_state_dict(state)
    expected = done.capture.run()
    module.load_state_dict(state)
    assert_rounding_apart(expected, done.outputs())


def test_a_bias_of_a_value_with_another_reader_is_not_absorbed():
    def run(m, x):
        y = F.linear(x, m.w)
        return y + m.b, y

    done = rewrite(body(run, w=weight(), b=vector()), X, [canonicalize])
    (node,) = done.nodes(LINEAR)
    assert node.args[2] == [None]
    assert done.counts == {"canonicalize": 1}


def test_views_that_another_shape_follows_stay():
    module = body(lambda m, x: F.linear(x.view(-1, K), m.w).view(5, 2, N), w=weight())
    done = rewrite(module, X, [canonicalize])
    (node,) = done.nodes(LINEAR)
    assert done.counts == {"canonicalize": 1}
    assert list(node.meta["example_value"].shape) == [10, N]
    assert_rounding_apart(done.capture.run(), done.outputs())


def test_an_input_written_to_between_view_and_linear_keeps_its_view():
    def run(m, x):
        rows = x.reshape(-1, K)  # a copy, taken before the write
        x.add_(1)
        return F.linear(rows, m.w).view(2, 5, N)

    done = rewrite(body(run, w=weight()), (torch.randn(5, 2, K).transpose(0, 1),), [canonicalize])
    assert done.counts == {"canonicalize": 1}
    assert_rounding_apart(done.capture.run(), done.outputs())
