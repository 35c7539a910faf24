"""Norms: every way that models write them becomes one; what only looks like one stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from qpass.passes import canonicalize
from tests.support.capture import Body, rewrite
from tests.support.tolerance import assert_rounding_apart

NORM = torch.ops.qpass.norm.default
K = 64


def norms(body, *, dtype=torch.float32, x=None, **parameters):
    """(norm, eps, offset, how many vectors) of each norm that canonicalize finds; the values stay."""
    parameters = {"w": nn.Parameter(torch.rand(K) + 0.5), "b": nn.Parameter(torch.randn(K))} | parameters
    module = Body(body, **parameters).to(dtype)
    x = (torch.randn(2, 5, K) if x is None else x).to(dtype)
    done = rewrite(module, (x,), [canonicalize])
    assert_rounding_apart(done.capture.run(), done.outputs(), dtype)
    found = done.nodes(NORM)
    assert all(node.args[0] in done.gm.graph.nodes for node in found)
    return [(n.args[1], n.args[4], sum(n.args[5:]), sum(a is not None for a in n.args[2:4])) for n in found]


def _by_hand(x, w, eps=1e-5, square=lambda x: x.pow(2)):
    y = x.to(torch.float32)
    return w * (y * torch.rsqrt(square(y).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _divided(x, w):
    return w * (x.float() / torch.sqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + 1e-5)).type_as(x)


def _cast_last(x, w):
    y = x.float()
    return (w.float() * (y * (y * y).mean(-1, keepdim=True).add(1e-5).rsqrt())).to(x.dtype)


def _by_power(x, w):
    y = x.float()
    return (y * torch.pow(torch.mean(y**2, -1, keepdim=True) + 1e-5, -0.5) * w.float()).to(x.dtype)


def _layer_by_hand(x, w, b):
    u = x.mean(-1, keepdim=True)
    s = (x - u).pow(2).mean(-1, keepdim=True)
    return w * ((x - u) / torch.sqrt(s + 1e-12)) + b


def _layer_by_var(x, w, b):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * w + b


RMS = ("rms", 1e-5, 0, 1)
SPELLINGS = {
    "F.rms_norm": (lambda m, x: F.rms_norm(x, (K,), m.w, 1e-5), RMS),
    "torch.rms_norm": (lambda m, x: torch.rms_norm(x, [K], m.w, eps=1e-5), RMS),
    "without weight or eps": (lambda m, x: F.rms_norm(x, (K,)), ("rms", torch.finfo(torch.float32).eps, 0, 0)),
    "F.layer_norm": (lambda m, x: F.layer_norm(x, (K,), m.w, m.b), ("layer", 1e-5, 0, 2)),
    "layer norm without bias": (lambda m, x: F.layer_norm(x, (K,), weight=m.w, eps=1e-3), ("layer", 1e-3, 0, 1)),
    "torch.layer_norm": (lambda m, x: torch.layer_norm(x, (K,), m.w, m.b, 1e-6), ("layer", 1e-6, 0, 2)),
    "by hand": (lambda m, x: _by_hand(x, m.w), RMS),
    "by hand, no weight": (lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5), ("rms", 1e-5, 0, 0)),
    "weight on the right": (lambda m, x: (x * torch.rsqrt(x.square().mean(-1, True) + 1e-5)) * m.w, RMS),
    "the scale on the left": (lambda m, x: m.w * (torch.rsqrt(x.pow(2).mean(2, True) + 1e-5) * x), RMS),
    "torch.square": (lambda m, x: _by_hand(x, m.w, square=torch.square), RMS),
    "divided by a root": (lambda m, x: _divided(x, m.w), RMS),
    "cast at the end": (lambda m, x: _cast_last(x, m.w), RMS),
    "by a power": (lambda m, x: _by_power(x, m.w), RMS),
    "weight counts from one": (lambda m, x: _by_hand(x, 1.0 + m.w), ("rms", 1e-5, 1.0, 1)),
    "with a bias": (lambda m, x: _by_hand(x, m.w) + m.b, ("rms", 1e-5, 0, 2)),
    "layer norm by hand": (lambda m, x: _layer_by_hand(x, m.w, m.b), ("layer", 1e-12, 0, 2)),
    "layer norm by var": (lambda m, x: _layer_by_var(x, m.w, m.b), ("layer", 1e-5, 0, 2)),
    "a tiny epsilon": (lambda m, x: _by_hand(x, m.w, 1e-12), ("rms", 1e-12, 0, 1)),
    "nn.RMSNorm": (nn.RMSNorm(K, eps=1e-6), ("rms", 1e-6, 0, 1)),
    "nn.LayerNorm": (nn.LayerNorm(K), ("layer", 1e-5, 0, 2)),
    "Llama": (LlamaRMSNorm(K, 1e-5), RMS),
    "Qwen2": (Qwen2RMSNorm(K, 1e-5), RMS),
    "Mistral": (MistralRMSNorm(K, 1e-5), RMS),
    "Olmo2": (Olmo2RMSNorm(K, 1e-5), RMS),
    "Gemma3": (Gemma3RMSNorm(K, 1e-5), ("rms", 1e-5, 1.0, 1)),
    "T5": (T5LayerNorm(K, 1e-5), RMS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name, dtype):
    body, expected = SPELLINGS[name]
    if isinstance(body, nn.Module):
        module = body
        assert norms(lambda m, x: m.norm(x), norm=module, dtype=dtype) == [expected]
    else:
        assert norms(body, dtype=dtype) == [expected]


@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, 4, K)], ids=str)
def test_any_rank(shape):
    assert norms(lambda m, x: _by_hand(x, m.w), x=torch.randn(shape)) == [RMS]


def test_between_other_pointwise_nodes():
    """The residual addition in front of it and what comes behind belong to nobody else's formula."""
    assert norms(lambda m, x: x + 2 * _by_hand(x * 3 + 1, m.w)) == [RMS]
    assert norms(lambda m, x: torch.tanh(_by_hand(torch.tanh(x), m.w))) == [RMS]


def test_one_behind_the_other():
    assert norms(lambda m, x: _by_hand(_by_hand(x, m.w), m.b)) == [RMS, RMS]


def _variance_kept(m, x):
    variance = x.pow(2).mean(-1, keepdim=True)
    return m.w * (x * torch.rsqrt(variance + 1e-5)), variance


def _written(m, x):
    y = x * 2
    z = _by_hand(y, m.w)
    y.add_(1)
    return z, y


TWINS = {
    "another dimension": lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)),
    "two dimensions": lambda m, x: F.layer_norm(x, (5, K)),
    "a sum": lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5),
    "a third power": lambda m, x: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-5),
    "no root": lambda m, x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "the epsilon outside of the root": lambda m, x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-5),
    "the unbiased variance": lambda m, x: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5),
    "uncentered over the variance": lambda m, x: x * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5),
    "another tensor's scale": lambda m, x: x * torch.rsqrt(x.sin().pow(2).mean(-1, keepdim=True) + 1e-5),
    "the variance has another reader": _variance_kept,
    "the weight is computed from x": lambda m, x: x.sum((0, 1)) * (x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5)),
    "x is written to": _written,
    "batch norm": lambda m, x: F.batch_norm(x.transpose(1, 2), m.b.detach() * 0, m.w.detach()),
    "a wider result": lambda m, x: F.rms_norm(x.double(), (K,)),
}


@pytest.mark.parametrize("name", TWINS)
def test_twins(name):
    found = norms(TWINS[name])
    assert found in ([], [("rms", 1e-5, 0, 0)] if name == "the weight is computed from x" else [])


def test_a_weight_that_is_no_parameter():
    module = Body(lambda m, x: F.rms_norm(x, (K,), m.scale), scale=None)
    del module.scale
    module.register_buffer("scale", torch.ones(K))
    assert not rewrite(module, (torch.randn(3, K),), [canonicalize]).nodes(NORM)


def test_a_result_in_another_dtype():
    """The weight is fp32 where x is bf16, so torch gives fp32: the norm is that of x cast to it."""
    module = Body(lambda m, x: _by_hand(x, m.w), w=nn.Parameter(torch.rand(K)))
    done = rewrite(module, (torch.randn(3, K).bfloat16(),), [canonicalize])
    (norm,) = done.nodes(NORM)
    assert [v.meta["example_value"].dtype for v in (norm.args[0], norm)] == [torch.float32] * 2
    assert done.outputs()[0].dtype == torch.float32
