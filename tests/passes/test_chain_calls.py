"""chain_calls: native calls that follow each other are one call; what stands between two of them keeps its place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qpass.cpu import detect
from qpass.kernels import attention_unit
from qpass.kernels.plan import SERVED
from qpass.passes import PIPELINE
from tests.support.capture import Body, rewrite

CHAIN = torch.ops.qpass.chain.default
LINEAR = torch.ops.qpass.packed_linear.default
ONE_BY_ONE = [step for step in PIPELINE if step.__name__ != "chain_calls"]

pytestmark = pytest.mark.skipif(detect().tier not in SERVED, reason="needs AVX2")


def body(function, **more):
    linears = {name: nn.Linear(64, 64, bias=name == "b") for name in "abc"}
    return Body(function, **linears, **more).to(torch.bfloat16)


def check(function, count, *inputs, left=0, results=None):
    """The same bits with chains as without; ``left`` calls are in none."""
    torch.manual_seed(0)
    module = body(function)
    inputs = inputs or (torch.randn(2, 5, 64).bfloat16(),)
    done = rewrite(module, inputs, PIPELINE, "w8a16", materialize=False)
    assert done.counts["chain_calls"] == count
    assert len(done.nodes(CHAIN)) == count
    assert len(done.nodes(LINEAR)) == left
    plain = rewrite(module, inputs, ONE_BY_ONE, "w8a16", materialize=False)
    assert len(plain.nodes(LINEAR)) >= 1
    for a, b in zip(done.outputs(), plain.outputs(), strict=True):
        assert torch.equal(a, b)
    if results is not None:
        assert [len(node.users) for node in done.nodes(CHAIN)] == results
    return done


def test_a_run_is_one_call_with_what_others_read_as_results():
    check(lambda m, x: m.c(m.b(m.a(x))), 1, results=[1])
    check(lambda m, x: (lambda y: (m.c(m.b(y)), y))(m.a(x)), 1, results=[2])
    two = torch.randn(3, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    check(lambda m, x, y: (m.a(x), m.b(y)), 1, *two, results=[2])  # neither reads the other


def test_epilogues_and_norms_come_along():
    done = check(lambda m, x: x + m.b(F.silu(m.a(F.rms_norm(x, (64,))))), 1)
    (chain,) = done.nodes(CHAIN)
    assert chain.args[1].count("packed_linear") == 2


def test_whatever_else_is_computed_ends_a_run():
    check(lambda m, x: m.c(m.b(m.a(x)).cumsum(1)), 1, left=1)
    check(lambda m, x: m.c(m.b(m.a(x).cumsum(1)).cumsum(1)), 0, left=3)


def test_a_write_between_two_calls_keeps_its_place():
    """x changes between them: the first call reads what it was, the second what it is then."""

    def function(m, x):
        first = m.a(x)
        x.add_(1)
        return first, m.b(x)

    torch.manual_seed(0)
    module, x = body(function), torch.randn(2, 64).bfloat16()
    done = rewrite(module, (x,), PIPELINE, "w8a16", materialize=False)
    assert done.counts["chain_calls"] == 0


def attend(m, x, k, v, span, after=lambda y: y.reshape(*y.shape[:2], -1)):
    q = m.a(x).view(2, 5, 4, 16).transpose(1, 2)
    return m.c(m.b(after(torch.ops.qpass.attention(q, k, v, span, 0.25))))


def cache():
    attention_unit.ensure()
    span = torch.tensor([0, 9], dtype=torch.int32).expand(2, 1, 5, 2)
    return torch.randn(2, 5, 64).bfloat16(), *(torch.randn(2, 2, 9, 16).bfloat16() for _ in range(2)), span


@pytest.mark.parametrize(
    "after",
    [
        lambda y: y.reshape(*y.shape[:2], -1),
        lambda y: y.reshape(*y.shape[:2], -1).contiguous(),
        lambda y: y.flatten(2),
        lambda y: y.view(2, 5, 64),
    ],
)
def test_attention_and_the_linear_behind_it(after):
    done = check(lambda m, *inputs: attend(m, *inputs, after), 1, *cache(), left=1)
    assert not done.nodes(torch.ops.qpass.attention)


@pytest.mark.parametrize(
    "after",
    [
        lambda y: y.transpose(1, 2).reshape(2, 5, 64),
        lambda y: y.reshape(5, 2, 64),
        lambda y: y.flatten(2).cumsum(1),
    ],
)
def test_twins_of_heads_side_by_side(after):
    done = check(lambda m, *inputs: attend(m, *inputs, after), 1, *cache(), left=1)
    assert len(done.nodes(torch.ops.qpass.attention)) == 1


def test_a_view_that_others_read_stays():
    def both(m, *inputs):
        seen = []
        return attend(m, *inputs, lambda y: seen.append(y.flatten(2)) or seen[0]), seen[0] + 1

    check(both, 0, *cache(), left=3)
