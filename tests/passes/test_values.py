"""Who writes to what: the analysis that keeps every pass off mutated values."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qpass.passes.values import Writes, only_user, same_kind, written_operands
from tests.support.capture import Body, capture

X = torch.randn(4, 6)

WRITES = {
    "add_": lambda x: x.add_(1),
    "copy_": lambda x: x.copy_(X),
    "index_copy_": lambda x: x.index_copy_(0, torch.tensor([1]), X[:1]),
    "index_put_": lambda x: x.index_put_((torch.tensor([1]),), X[:1]),
    "setitem": lambda x: _assign(x),
    "iadd": lambda x: operator.iadd(x, 1),
    "ipow": lambda x: operator.ipow(x, 2),
    "inplace=True": lambda x: F.relu(x, inplace=True),
    "inplace by position": lambda x: F.dropout(x, 0.0, False, True),
    "torch.relu_": torch.relu_,
    "out=": lambda x: torch.add(X, 1, out=x),
    "aten overload": lambda x: torch.ops.aten.add_.Tensor(x, x),
    "through a view": lambda x: x.view(-1)[2:5].mul_(2),
    "through a chunk": lambda x: x.chunk(2)[1].zero_(),
    "through a detach": lambda x: x.detach().add_(1),
}


def _assign(x):
    x[0] = 1.0


@pytest.mark.parametrize("name", WRITES)
def test_writes(name):
    def function(x):
        y = x * 2
        z = x * 3
        WRITES[name](y)
        return y, z

    graph = capture(function, X).gm.graph
    writes = Writes(graph)
    y, z = (node for node in graph.nodes if node.target is operator.mul and node.args[1] in (2, 3))
    assert writes.touch(y)
    assert not writes.touch(z)


READS = {
    "add": lambda x: x.add(1),
    "inplace=False": lambda x: F.relu(x, inplace=False),
    "a copy is written to": lambda x: x.clone().add_(1),
    "a sum is written to": lambda x: (x + 1).add_(1),
    "aten overload": lambda x: torch.ops.aten.add.Tensor(x, x),
    "getitem": lambda x: x[0] + 1,
    "numbers": lambda x: x + operator.iadd(1, 2),
}


@pytest.mark.parametrize("name", READS)
def test_reads(name):
    def function(x):
        y = x * 2
        return READS[name](y), y

    graph = capture(function, X).gm.graph
    y = next(node for node in graph.nodes if node.target is operator.mul)
    assert not Writes(graph).touch(y)


def test_an_embedding_that_renormalizes_writes_to_its_table():
    module = Body(lambda m, ids: F.embedding(ids, m.table, max_norm=1.0), table=nn.Parameter(X, requires_grad=False))
    try:
        graph = capture(module, torch.tensor([1])).gm.graph
    except Exception:
        pytest.skip("Dynamo does not capture max_norm")
    assert any(node.op == "placeholder" for n in graph.nodes for node in written_operands(n))


def test_only_user_counts_readings():
    def function(x):
        y = x * 2
        return y + y

    graph = capture(function, X).gm.graph
    y = next(node for node in graph.nodes if node.target is operator.mul)
    assert len(y.users) == 1
    assert only_user(y) is None


def test_same_kind_adds_no_guard():
    """Sizes that merely happen to be equal are not the same."""
    captured = []

    def backend(gm, inputs):
        captured.append(gm)
        return gm.forward

    torch._dynamo.reset()
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    torch._dynamo.mark_dynamic(a, 0)
    torch._dynamo.mark_dynamic(b, 0)
    torch.compile(lambda x, y: (x * 2, y * 3, x * 4), backend=backend)(a, b)
    x2, y3, x4 = (node for node in captured[0].graph.nodes if node.target is operator.mul)
    assert same_kind(x2, x4)
    assert not same_kind(x2, y3)
