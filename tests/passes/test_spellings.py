"""canonicalize, the rest: sums and products, in-place calls, nodes that do nothing."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qpass.passes import canonicalize
from tests.support.capture import rewrite
from tests.support.tolerance import assert_rounding_apart

X, Y = torch.randn(4, 6), torch.randn(4, 6)


def after(function, inputs=(X, Y)):
    done = rewrite(function, inputs, [canonicalize])
    assert_rounding_apart(done.capture.run(), done.outputs())
    nodes = [node for node in done.gm.graph.nodes if node.op.startswith("call") and "example_value" in node.meta]
    targets = [node.target for node in nodes]
    return targets, done.counts["canonicalize"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, y: torch.add(x, y), operator.add),
        (lambda x, y: torch.add(x, other=y, alpha=1), operator.add),
        (lambda x, y: x.add(y), operator.add),
        (lambda x, y: torch.mul(x, y), operator.mul),
        (lambda x, y: x.mul(y), operator.mul),
        (lambda x, y: torch.multiply(x, 2.0), operator.mul),
    ],
)
def test_one_spelling(function, expected):
    assert after(function) == ([expected], 1)


def test_scaled_addition_stays():
    assert after(lambda x, y: torch.add(x, y, alpha=2)) == ([torch.add], 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: F.dropout(x, 0.1, training=False) - y,
        lambda x, y: F.dropout(x, 0.0, training=True) - y,
        lambda x, y: torch.dropout(x, 0.1, False) - y,
        lambda x, y: nn.Dropout(0.3).eval()(x) - y,
        lambda x, y: x.contiguous() - y,
        lambda x, y: x.to(torch.float32) - y,
        lambda x, y: x.float() - y,
        lambda x, y: x.type_as(y) - y,
        lambda x, y: x.view(4, 6) - y,
        lambda x, y: x.reshape(-1, 6) - y,
        lambda x, y: x[:] - y,
        lambda x, y: x[0:, :6] - y,
        lambda x, y: x[..., -6:] - y,
    ],
)
def test_a_node_that_does_nothing_goes(function):
    assert after(function) == ([operator.sub], 1)


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x, y: x.t().contiguous() - y.t(), "contiguous"),
        (lambda x, y: x.to(torch.float64) - y, "to"),
        (lambda x, y: x.to(torch.float32, copy=True) - y, "to"),
        (lambda x, y: x.double() - y, "double"),
        (lambda x, y: x.view(6, 4) - y.view(6, 4), "view"),
        (lambda x, y: x[1:] - y[1:], operator.getitem),
        (lambda x, y: x[::1, ::2] - y[:, :3], operator.getitem),
        (lambda x, y: x[None, :] - y, operator.getitem),
        (lambda x, y: x[torch.arange(3, -1, -1)] - y, operator.getitem),
        (lambda x, y: F.dropout(x, 0.5, training=True) * 0 - y, F.dropout),
    ],
)
def test_a_node_that_does_something_stays(function, kept):
    targets, count = after(function)
    assert kept in targets
    assert count == 0


IN_PLACE = {
    "iadd": (lambda x, y: _iadd(x * 2, y), operator.add),
    "imul": (lambda x, y: _imul(x - 2, y), operator.mul),
    "add_": (lambda x, y: (x * 2).add_(y), operator.add),
    "mul_ by a number": (lambda x, y: (x - y).mul_(2.0), operator.mul),
    "smaller operand": (lambda x, y: _iadd(x * 2, y[0]), operator.add),
}


def _iadd(a, b):
    a += b
    return a


def _imul(a, b):
    a *= b
    return a


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_calls_that_nobody_can_tell(name):
    function, expected = IN_PLACE[name]
    targets, count = after(function)
    assert targets[-1] is expected
    assert count == 1


def _with_a_view(x, y):
    z = x * 2
    row = z[0]
    z += y
    return z, row


def _with_a_reader(x, y):
    z = x * 2
    w = z - 1
    z += y
    return z, w


TWINS = {
    "an input": _iadd,
    "a view of an input": lambda x, y: _iadd(x[1:], y[1:]),
    "a value with a view": _with_a_view,
    "a value with another reader": _with_a_reader,
    "a cast": lambda x, y: _iadd(x * 2, y.double()),
    "of itself": lambda x, y: (lambda z: _iadd(z, z))(x * 2),
    "scaled": lambda x, y: (x * 2).add_(y, alpha=2),
    "other operation": lambda x, y: (x * 2).sub_(y),
}


@pytest.mark.parametrize("name", TWINS)
def test_in_place_calls_that_somebody_can_tell(name):
    _, count = after(TWINS[name])
    assert count == 0


def test_a_write_behind_a_dropped_dropout_is_still_seen():
    """A dropout's fake value is a copy, its real one is the operand: the write below reaches y."""

    def function(x, w):
        y = x * 2
        z = y * torch.sigmoid(y)  # a silu, but y is written to afterwards
        F.dropout(y, 0.1, training=False).view(-1).add_(1)
        return z, y

    targets, count = after(function)
    assert F.silu not in targets
    assert count == 1
