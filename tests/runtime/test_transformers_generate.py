"""transformers' own ``generate()`` on a model compiled by qpass: same tokens, and a bounded number of graphs."""

import copy

import pytest
import tiny_decoders
import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

import qpass

NEW = 12


@pytest.fixture
def compiled():
    """A fresh model (its Parameters decide which packed weights are shared) compiled without quantization, and itself."""
    torch._dynamo.reset()
    counters.clear()
    model = copy.deepcopy(tiny_decoders.build("llama"))
    return model, qpass.compile(model, scheme="w16a16")


def _generate(model, length, seed=1, **options):
    ids = tiny_decoders.prompt(length, seed=seed)
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, **options)


def test_with_a_dynamic_cache_the_graphs_are_a_handful(compiled):
    """The cache grows by one a token: prompt, first token, one graph for every later one; a second prompt of another
    length adds a prompt graph for every length and a token graph for its cache's strides; nothing adds more."""
    model, fast = compiled
    assert torch.equal(_generate(fast, 5), _generate(model, 5))
    first = counters["stats"]["unique_graphs"]
    assert first <= 3
    for length in (7, 11, 20, 40):
        assert torch.equal(_generate(fast, length), _generate(model, length))
    assert counters["stats"]["unique_graphs"] <= 5


def test_with_a_static_cache_the_graphs_are_a_handful(compiled):
    model, fast = compiled

    def cache():
        return StaticCache(config=model.config, max_cache_len=64)

    assert torch.equal(_generate(fast, 5, past_key_values=cache()), _generate(model, 5))
    first = counters["stats"]["unique_graphs"]
    assert first <= 2
    for length in (7, 11, 20):
        assert torch.equal(_generate(fast, length, past_key_values=cache()), _generate(model, length))
    assert counters["stats"]["unique_graphs"] <= 3


def test_the_decoder_and_generate_agree_on_a_quantized_model():
    """One packed copy of each weight serves both; int8 weights, so the bar is equal tokens of one quantized model."""
    from functools import partial

    from qpass.runtime.decoder import Decoder
    from qpass.runtime.speculate import Speculator

    torch._dynamo.reset()
    model = copy.deepcopy(tiny_decoders.build("llama"))
    compile = partial(qpass.compile, scheme="w8a16", fullgraph=True, dynamic=False)
    decoder = Speculator(Decoder(model, compile))
    ids = tiny_decoders.prompt(6)
    ours = decoder.generate(ids, max_new_tokens=NEW)
    theirs = _generate(qpass.compile(model, scheme="w8a16"), 6)
    assert torch.equal(ours.sequences, theirs)
    assert ours.graphs == 2
