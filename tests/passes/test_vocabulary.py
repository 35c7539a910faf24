"""The vocabulary check names what a stage must not say."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qpass.errors import QpassError
from qpass.passes import PIPELINE, canonicalize, fuse_epilogues, lower, merge_siblings, quantize_linears
from qpass.passes.vocabulary import ALLOWED, check
from tests.support.capture import Body, rewrite

LINEAR = torch.ops.qpass.linear.default
QUANTIZED = torch.ops.qpass.quantized_linear.default
X = torch.randn(3, 64)


def model():
    return Body(lambda m, x: F.relu(m.fc(x)) * 2, fc=nn.Linear(64, 32))


def after(*steps, **options):
    return rewrite(model(), (X,), steps, **options)


def named(function, name):
    """The bad pass under a good one's name: the runner checks by name."""
    function.__name__ = name
    return function


def test_every_pass_has_a_vocabulary():
    assert list(ALLOWED) == [step.__name__ for step in PIPELINE]


def test_the_pipeline_keeps_to_it():
    done = after(*PIPELINE, lowering="reference", materialize=False)
    assert list(done.counts) == list(ALLOWED)


def test_a_linear_that_canonicalize_forgot():
    with pytest.raises(QpassError, match=r"pass canonicalize left .*linear over fc.weight .*neither"):
        after(named(lambda graph, ctx: 0, "canonicalize"))


def test_a_forgotten_linear_that_is_accounted_for():
    def skip(graph, ctx):
        ctx.left["fc"] = "for a reason"
        node = next(n for n in graph.nodes if n.target is F.relu)
        node.args, node.kwargs = node.args[:1], {}
        return 0

    assert after(named(skip, "canonicalize")).counts == {"canonicalize": 0}


@pytest.mark.parametrize(("target", "args"), [(torch.add, 2), ("mul", 2), (torch.relu, 1), ("relu", 1)])
def test_another_spelling(target, args):
    def respell(graph, ctx):
        canonicalize(graph, ctx)
        node = next(n for n in graph.nodes if n.target is operator.mul)
        node.op = "call_method" if isinstance(target, str) else "call_function"
        node.target, node.args = target, node.args[:args]
        return 0

    with pytest.raises(QpassError, match="has another spelling"):
        after(named(respell, "canonicalize"))


def test_an_op_before_its_time():
    def early(graph, ctx):
        return canonicalize(graph, ctx) + quantize_linears(graph, ctx)

    with pytest.raises(QpassError, match=r"qpass\.quantized_linear has no place after canonicalize"):
        after(named(early, "canonicalize"))


def test_an_epilogue_before_its_time():
    def early(graph, ctx):
        return quantize_linears(graph, ctx) + fuse_epilogues(graph, ctx)

    with pytest.raises(QpassError, match="activation in a quantized_linear after quantize_linears"):
        after(canonicalize, merge_siblings, named(early, "quantize_linears"))


def test_a_linear_without_names():
    def forget(graph, ctx):
        canonicalize(graph, ctx)
        del next(iter(graph.find_nodes(op="call_function", target=LINEAR))).meta["qpass_names"]
        return 1

    with pytest.raises(QpassError, match="without the names of its modules"):
        after(named(forget, "canonicalize"))


def test_a_linear_without_a_value():
    def forget(graph, ctx):
        canonicalize(graph, ctx)
        del next(iter(graph.find_nodes(op="call_function", target=LINEAR))).meta["example_value"]
        return 1

    with pytest.raises(QpassError, match="without a value"):
        after(named(forget, "canonicalize"))


def test_more_weights_than_names():
    def double(graph, ctx):
        count = canonicalize(graph, ctx)
        (node,) = graph.find_nodes(op="call_function", target=LINEAR)
        node.args = (node.args[0], node.args[1] * 2, node.args[2])
        return count

    with pytest.raises(QpassError, match="1 names, 2 weights, 1 biases"):
        after(named(double, "canonicalize"))


@pytest.mark.parametrize("forgotten", ["linear", "quantized_linear"])
def test_what_lower_forgot(forgotten):
    steps = [canonicalize, merge_siblings, quantize_linears, fuse_epilogues]
    scheme = "w16a16" if forgotten == "linear" else "w8a16"
    with pytest.raises(QpassError, match=r"has no place after lower|was not lowered"):
        rewrite(model(), (X,), [*steps, named(lambda graph, ctx: 0, "lower")], scheme, materialize=False)


def test_other_stages_are_not_checked():
    done = after(canonicalize)
    assert check("somebody_elses_pass", done.gm.graph, done.ctx) == []
    assert lower.__name__ in ALLOWED
