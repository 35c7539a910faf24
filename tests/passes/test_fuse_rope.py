"""fuse_rope: what stands between q|k|v and attention over a static cache is one call; formulas and graphs that are not it stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qpass.kernels import attention_unit
from qpass.passes import PIPELINE
from qpass.runtime import attention
from qpass.runtime.kv import KVCache
from qpass.runtime.step import make_step, probe
from tests.support.capture import Body, rewrite
from tests.support.tiny_models import build
from tests.support.tolerance import assert_rounding_apart

ROPE = torch.ops.qpass.rope_append.default
STEPS = PIPELINE[: [step.__name__ for step in PIPELINE].index("fuse_rope") + 1]
BATCH, TOKENS, HEADS, SHARED, WIDTH, LENGTH = 2, 3, 4, 2, 16, 30


def rotate_half(x):
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


def rotated(x, cos, sin):
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


class Layer(Body):
    """A layer's way from its input to attention; ``parts`` replaces pieces of it."""

    def __init__(self, **parts):
        super().__init__(lambda m, *inputs: m.step(*inputs), qkv=nn.Linear(64, (HEADS + 2 * SHARED) * WIDTH))
        self.parts = parts

    def part(self, name, plain):
        return self.parts.get(name, plain)

    def step(self, x, cos, sin, position, keys, values, span):
        q, k, v = self.qkv(x).split([HEADS * WIDTH, SHARED * WIDTH, SHARED * WIDTH], -1)
        q, k, v = (t.view(BATCH, TOKENS, -1, WIDTH).transpose(1, 2) for t in (q, k, v))
        q, k = self.part("rotate", lambda q, k, cos, sin: (rotated(q, cos, sin), rotated(k, cos, sin)))(q, k, cos, sin)
        slots = position[:, None] + torch.arange(TOKENS)
        rows = torch.arange(BATCH)[:, None]
        return self.part("attend", attend)(q, k, v, slots, rows, keys, values, span)


def attend(q, k, v, slots, rows, keys, values, span):
    keys[slots, rows] = k.transpose(1, 2)
    values[slots, rows] = v.transpose(1, 2)
    return torch.ops.qpass.attention(q, keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3), span, 0.25)


def inputs(rotates=WIDTH, tables=BATCH):
    torch.manual_seed(0)
    cache = [torch.randn(LENGTH, BATCH, SHARED, WIDTH) for _ in range(2)]
    position = torch.tensor([5, 9])
    last = position[:, None] + torch.arange(TOKENS) + 1
    span = torch.stack([torch.zeros_like(last), last], -1)[:, None].to(torch.int32)
    tables = [torch.randn(tables, TOKENS, rotates) for _ in range(2)]
    return torch.randn(BATCH, TOKENS, 64), *tables, position, *cache, span


def check(count, given=None, **parts):
    """``count`` calls, and the same result with the pass as without."""
    attention_unit.ensure()
    module, given = Layer(**parts), given or inputs()
    done, plain = (rewrite(module, given, steps, "w16a16") for steps in (STEPS, STEPS[:-1]))
    assert done.counts["fuse_rope"] == len(done.nodes(ROPE)) == count
    assert_rounding_apart(plain.outputs(), done.outputs())
    return done


def test_halves_against_each_other():
    done = check(1)
    assert not any("setitem" in str(node.target) for node in done.gm.graph.nodes)


def test_one_table_for_all_rows():
    check(1, inputs(tables=1))


def _share(q, k, cos, sin):
    return tuple(torch.cat([rotated(x[..., :8], cos, sin), x[..., 8:]], -1) for x in (q, k))


def _copied_into_the_cache(q, k, v, slots, rows, keys, values, span):
    keys[slots, rows] = k.transpose(1, 2) * 1
    values[slots, rows] = v.transpose(1, 2)
    return torch.ops.qpass.attention(q, keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3), span, 0.25)


SPELLINGS = {
    "sums the other way round": lambda q, k, cos, sin: tuple(
        (rotate_half(x) * sin[:, None]).add(cos[:, None] * x) for x in (q, k)
    ),
    "halves apart": lambda q, k, cos, sin: tuple(
        torch.cat(
            [
                x[..., :8] * cos[:, None, :, :8] - x[..., 8:] * sin[:, None, :, :8],
                x[..., 8:] * cos[:, None, :, 8:] + x[..., :8] * sin[:, None, :, 8:],
            ],
            -1,
        )
        for x in (q, k)
    ),
    "nothing is rotated": lambda q, k, cos, sin: (q, k),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    check(1, rotate=SPELLINGS[name])


def test_a_share_of_each_head():
    check(1, inputs(rotates=8), rotate=_share)


def test_a_step_that_changes_nothing():
    check(1, attend=_copied_into_the_cache)


TURNS = {
    "pairs side by side": lambda q, k, cos, sin: tuple(
        x * cos[:, None] + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin[:, None] for x in (q, k)
    ),
    "the other way": lambda q, k, cos, sin: tuple(x * cos[:, None] - rotate_half(x) * sin[:, None] for x in (q, k)),
    "queries alone": lambda q, k, cos, sin: (rotated(q, cos, sin), k),
    "scaled": lambda q, k, cos, sin: (rotated(q, cos, sin) * 1.5, rotated(k, cos, sin)),
    "the keys' tables swapped": lambda q, k, cos, sin: (rotated(q, cos, sin), rotated(k, sin, cos)),
    "something unknown": lambda q, k, cos, sin: (rotated(q, cos, sin).tanh(), rotated(k, cos, sin)),
}


@pytest.mark.parametrize("name", TURNS)
def test_twins_of_the_formula(name):
    check(0, rotate=TURNS[name])


def _view(cache):
    return cache.permute(1, 2, 0, 3)


def _other_slots(q, k, v, slots, rows, keys, values, span):
    keys[slots, rows] = k.transpose(1, 2)
    values[slots + 1, rows] = v.transpose(1, 2)
    return torch.ops.qpass.attention(q, _view(keys), _view(values), span, 0.25)


def _other_rows(q, k, v, slots, rows, keys, values, span):
    keys[slots, 1 - rows] = k.transpose(1, 2)
    values[slots, 1 - rows] = v.transpose(1, 2)
    return torch.ops.qpass.attention(q, _view(keys), _view(values), span, 0.25)


def _read_before(q, k, v, slots, rows, keys, values, span):
    seen = keys.sum()
    return attend(q, k, v, slots, rows, keys, values, span), seen


def _read_behind(q, k, v, slots, rows, keys, values, span):
    return attend(q, k, v, slots, rows, keys, values, span), keys.sum()


def _written_twice(q, k, v, slots, rows, keys, values, span):
    keys[slots, rows] = v.transpose(1, 2)
    return attend(q, k, v, slots, rows, keys, values, span)


def _written_behind(q, k, v, slots, rows, keys, values, span):
    out = torch.ops.qpass.attention(q, _view(keys), _view(values), span, 0.25)
    keys[slots, rows] = k.transpose(1, 2)
    values[slots, rows] = v.transpose(1, 2)
    return out


def _queries_read_elsewhere(q, k, v, slots, rows, keys, values, span):
    return attend(q, k, v, slots, rows, keys, values, span), q + 1


def _one_cache(q, k, v, slots, rows, keys, values, span):
    keys[slots, rows] = k.transpose(1, 2)
    return torch.ops.qpass.attention(q, _view(keys), _view(keys), span, 0.25)


def _another_order(q, k, v, slots, rows, keys, values, span):
    keys[slots, rows] = v.transpose(1, 2)
    values[slots, rows] = k.transpose(1, 2)
    return torch.ops.qpass.attention(q, _view(keys), _view(values), span, 0.25)


@pytest.mark.parametrize(
    "twin",
    [
        _other_slots,
        _other_rows,
        _read_before,
        _read_behind,
        _written_twice,
        _written_behind,
        _queries_read_elsewhere,
        _one_cache,
        _another_order,
    ],
)
def test_twins_of_the_graph(twin):
    check(0, attend=twin)


FAMILIES = {"llama": 2, "qwen2": 2, "mistral": 2, "phi3": 2, "starcoder2": 2, "gpt_bigcode": 2, "mixtral": 2}
OTHERS = {"qwen3": 0, "gemma3": 0, "gptj": 0}  # norms of the heads; pairs side by side


@pytest.mark.parametrize("family", FAMILIES | OTHERS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_steps_of_real_models(family, tokens):
    attention.prepare()
    model = build(family)
    attention.keep_tables(model)
    cache = KVCache.allocate(probe(model), 2, 64)
    step = make_step(model, last_only=False)
    ids, pad = torch.randint(3, 200, (2, tokens)), torch.zeros(2, dtype=torch.int64)
    with attention.swapped(attention.configs_of(model)):
        given = (ids, pad + 5, pad, cache.keys, cache.values)
        done = rewrite(step, given, STEPS, "w8a16", materialize=False)
    assert done.counts["fuse_rope"] == (FAMILIES | OTHERS)[family]
