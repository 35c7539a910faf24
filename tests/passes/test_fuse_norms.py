"""fuse_norms: a norm goes into the one linear that reads it; several readers keep it apart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qpass.ops.norm import apply_norm
from qpass.passes import PIPELINE, canonicalize, fuse_epilogues, fuse_norms, merge_siblings, quantize_linears
from qpass.passes.linears import spell_linear
from qpass.passes.names import Names
from qpass.passes.values import Writes
from qpass.scheme import Scheme
from tests.support.capture import Body, rewrite
from tests.support.tolerance import assert_rounding_apart, sqnr_db

NORM = torch.ops.qpass.norm.default
QUANTIZED = torch.ops.qpass.quantized_linear.default
BEFORE = [canonicalize, merge_siblings, quantize_linears]
STEPS = [*BEFORE, fuse_norms, fuse_epilogues]
X = torch.randn(2, 5, 64)


class OneMore(nn.RMSNorm):
    """Gemma's: the weight counts from one."""

    def forward(self, x):
        y = x.float()
        return ((1.0 + self.weight.float()) * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))).type_as(x)


def fused(body, *inputs, scheme="w4a16-g32", **modules):
    """What each quantized linear took, the pass's count, and how many norms are left."""
    modules = {
        "rms": nn.RMSNorm(64, eps=1e-6),
        "layer": nn.LayerNorm(64),
        "gemma": OneMore(64),
        "fc": nn.Linear(64, 96),
        "up": nn.Linear(64, 96),
        "down": nn.Linear(96, 64),
    } | modules
    module, inputs = Body(body, **modules), inputs or (X,)
    with torch.no_grad():
        for norm in ("rms", "layer", "gemma"):
            for parameter in module.get_submodule(norm).parameters():
                parameter.copy_(torch.rand(64) + 0.5)
    done, plain = rewrite(module, inputs, STEPS, scheme), rewrite(module, inputs, BEFORE, scheme)
    assert_rounding_apart(plain.outputs(), done.outputs())
    return (
        [node.meta["qpass_fused"] for node in done.nodes(QUANTIZED)],
        done.counts["fuse_norms"],
        len(done.nodes(NORM)),
    )


FUSED = {
    "rms": (lambda m, x: m.fc(m.rms(x)), ("rms_norm", "bias")),
    "layer": (lambda m, x: m.fc(m.layer(x)), ("layer_norm", "bias")),
    "gemma": (lambda m, x: m.fc(m.gemma(x)), ("rms_norm", "bias")),
    "no weight": (lambda m, x: m.fc(F.rms_norm(x, (64,))), ("rms_norm", "bias")),
    "an epilogue as well": (lambda m, x: F.silu(m.fc(m.rms(x))), ("rms_norm", "bias", "silu")),
    "a gated pair": (lambda m, x: (lambda y: F.silu(m.fc(y)) * m.up(y))(m.rms(x)), ("rms_norm", "bias", "silu", "glu")),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16"])
def test_fused(name, scheme):
    body, parts = FUSED[name]
    assert fused(body, scheme=scheme) == ([parts], 1, 0)


def test_a_norm_that_is_computed_twice_is_fused_twice():
    """Two calls of one norm module: each linear reads its own."""
    found = fused(lambda m, x: F.silu(m.fc(m.rms(x))) * m.up(m.rms(x)))
    assert found == ([("rms_norm", "bias", "silu"), ("rms_norm", "bias", "mul")], 2, 0)


def test_the_residual_stream_is_what_both_read():
    square = nn.Linear(64, 64)
    assert fused(lambda m, x: x + m.sq(m.rms(x)), sq=square) == ([("rms_norm", "bias", "residual")], 1, 0)


def _norm_returned(m, x):
    y = m.rms(x)
    return m.fc(y), y


def _x_written(m, x):
    y = x * 2
    z = m.fc(m.rms(y))
    y.add_(1)
    return z, y


TWINS = {
    "the norm has another reader": (_norm_returned, 1),
    "siblings that were not merged": (lambda m, x: (lambda y: (F.silu(m.fc(y)), m.up(y)))(m.rms(x)), 1),
    "x is written to": (_x_written, 0),  # it is no norm then
    "something in between": (lambda m, x: m.fc(m.rms(x).sin()), 1),
    "a view in between": (lambda m, x: m.fc(m.rms(x).view(10, 64)), 1),
    "not the input": (lambda m, x: m.fc(x) + F.pad(m.rms(x), (0, 32)), 1),
    "the residual": (lambda m, x: m.sq(x.cos()) + m.rms(x), 1),
}


@pytest.mark.parametrize("name", TWINS)
def test_twins(name):
    body, left = TWINS[name]
    parts, count, norms = fused(body, sq=nn.Linear(64, 64))
    assert (count, norms) == (0, left)
    assert not any(part.endswith("norm") for found in parts for part in found)


def test_schemes_apart_are_two_readers():
    schemes = {"fc": Scheme.parse("w8a16"), "up": Scheme.parse("w4a16-g32")}
    body = TWINS["siblings that were not merged"][0]
    assert fused(body, scheme=lambda name, tied: schemes[name])[1:] == (0, 1)


def test_a_linear_that_is_not_quantized_takes_none_and_the_norm_goes_back_to_torch():
    module = Body(lambda m, x: m.fc(m.norm(x)), fc=nn.Linear(64, 96), norm=nn.RMSNorm(64))
    done = rewrite(module, (X,), PIPELINE, "w16a16")
    assert done.counts["fuse_norms"] == 0
    assert not done.nodes(NORM)
    assert len(done.nodes(apply_norm)) == 1
    assert_rounding_apart(done.capture.run(), done.outputs())


def test_weights_are_fp32_constants():
    module = Body(lambda m, x: m.fc(m.norm(x)), fc=nn.Linear(64, 96), norm=OneMore(64)).bfloat16()
    with torch.no_grad():
        module.norm.weight.copy_(torch.randn(64))
    done = rewrite(module, (X.bfloat16(),), STEPS, "w8a16")
    (site,) = done.nodes(QUANTIZED)
    weight = getattr(done.gm, site.kwargs["norm_weight"].target)
    assert torch.equal(weight, module.norm.weight.float() + 1)
    assert "norm_bias" not in site.kwargs


def test_a_fused_norm_rounds_once():
    """In bf16 the fused result is at least as close to fp32 as the nodes that round in between."""
    module = Body(lambda m, x: m.fc(m.norm(x)), fc=nn.Linear(64, 96), norm=nn.RMSNorm(64)).bfloat16()
    with torch.no_grad():
        module.norm.weight.copy_(torch.rand(64))
    (taken,) = rewrite(module, (X.bfloat16(),), STEPS).outputs()
    (plain,) = rewrite(module, (X.bfloat16(),), [only_linears]).outputs()
    (exact,) = rewrite(module.float(), (X.bfloat16().float(),), BEFORE).outputs()
    assert sqnr_db(exact, taken) > sqnr_db(exact, plain) - 0.5


def only_linears(graph, ctx):
    """Quantizes the linears of a capture, whose norms keep their own spelling."""
    names, writes = Names(graph, ctx.parameters), Writes(graph)
    return sum(spell_linear(node, ctx, names, writes) for node in list(graph.nodes)) + quantize_linears(graph, ctx)
