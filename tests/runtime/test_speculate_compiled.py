"""Compiled and quantized, speculation changes no bit: not of the tokens, not of the cache; and it compiles few graphs."""

import hashlib
from functools import partial

import pytest
import tiny_decoders
import torch
import transformers
from drafts import Oracle, Random

import qpass
from qpass.frontends.backend import STORE
from qpass.runtime.decoder import Decoder
from qpass.runtime.draft import LayersDraft, ModelDraft
from qpass.runtime.shorten import first_layers
from qpass.runtime.speculate import Speculator

NEW = 48
HIDDEN = 128
KS = (1, 2, 3, 4, 5, 7, 8, 15, "auto")


def _model():
    """A bf16 Llama of two layers whose greedy text does not run into a loop at once."""
    config = tiny_decoders.CONFIGS["qwen2"]()
    config.hidden_size, config.intermediate_size, config.vocab_size = HIDDEN, 256, 512
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).bfloat16()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


class _Kept(Decoder):
    """Keeps the cache that it allocated last."""

    def allocate(self, batch, length):
        self.cache = super().allocate(batch, length)
        return self.cache

    def held(self, tokens):
        """A digest of what the cache holds in its first slots."""
        digest = hashlib.sha256()
        for tensor in (*self.cache.keys, *self.cache.values):
            digest.update(tensor[:tokens].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _plain(decoder, lengths):
    """Prompts, their plain continuations, and the digest of the cache behind each."""
    prompts = [tiny_decoders.prompt(n, seed=n) for n in lengths]
    wanted, held = [], []
    for ids in prompts:
        wanted.append(Speculator(decoder).generate(ids, max_new_tokens=NEW).new_tokens[0])
        held.append(decoder.held(ids.shape[1] + NEW - 1))
    assert len({tuple(text) for text in wanted}) == len(wanted)
    assert len(set(wanted[0])) > 10
    return prompts, wanted, held


@pytest.mark.parametrize(
    ("scheme", "kv_dtype"),
    [("w8a8-dynamic", None), ("w4a8-g32", None), ("w4a8-g32", "int8"), ("w8a16", None), ("w4a16-g32", None)],
)
def test_speculation_changes_no_bit(scheme, kv_dtype):
    torch._dynamo.reset()
    compile = partial(qpass.compile, scheme=scheme, fullgraph=True, dynamic=False)
    decoder = _Kept(_model(), compile, kv_dtype=kv_dtype)
    prompts, wanted, held = _plain(decoder, (9, 2, 75))
    texts = [ids[0].tolist() + new for ids, new in zip(prompts, wanted, strict=True)]
    for draft in (Oracle(texts, [], wrong=lambda place: place % 5 == 0), Random(512)):
        for k in KS:
            for ids, new, digest in zip(prompts, wanted, held, strict=True):
                speculator = Speculator(decoder, draft, k=k)
                assert speculator.generate(ids, max_new_tokens=NEW).new_tokens[0] == new, (type(draft).__name__, k)
                assert decoder.held(ids.shape[1] + NEW - 1) == digest, (type(draft).__name__, k)
    assert decoder.graphs == 3, "prompt, token and one verification for every k"


def test_rows_of_a_batch_have_the_bits_that_they_have_alone():
    """With the first layers as a draft too, which write to the target's own cache."""
    torch._dynamo.reset()
    model = _model()
    compile = partial(qpass.compile, scheme="w4a8-g32", fullgraph=True, dynamic=False)
    decoder = _Kept(model, compile)
    prompts, wanted, held = _plain(decoder, (3, 75, 9, 40))
    texts = [ids[0].tolist() + new for ids, new in zip(prompts, wanted, strict=True)]
    drafts = [
        Oracle(texts, [], wrong=lambda place: place % 5 == 0),
        LayersDraft(Decoder(first_layers(model, 1), compile)),
    ]
    for k in (4, "auto"):
        assert Speculator(decoder, drafts[1], k=k).generate(prompts[1], max_new_tokens=NEW).new_tokens[0] == wanted[1]
        assert decoder.held(75 + NEW - 1) == held[1]
    for batch in (2, 4):
        longest = max(ids.shape[1] for ids in prompts[:batch])
        ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in prompts[:batch]])
        mask = torch.cat(
            [torch.nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in prompts[:batch]]
        )
        for draft, k in ((drafts[0], 4), (drafts[1], 3), (drafts[0], "auto")):
            out = Speculator(decoder, draft, k=k).generate(ids, mask, max_new_tokens=NEW)
            assert out.new_tokens == wanted[:batch], (type(draft).__name__, k, batch)


def test_a_compiled_draft_model_is_three_graphs():
    torch._dynamo.reset()
    compile = partial(qpass.compile, scheme="w8a8-dynamic", fullgraph=True, dynamic=False)
    target, small = Decoder(_model(), compile), Decoder(_model(), compile)
    speculator = Speculator(target, ModelDraft(small), k=4)
    for length in (2, 5, 30):
        ids = tiny_decoders.prompt(length, seed=length)
        out = speculator.generate(ids, max_new_tokens=NEW)
        assert out.new_tokens == Speculator(target).generate(ids, max_new_tokens=NEW).new_tokens
        # the same weights say the same, but for what the prompt's graph, which read one token more here, rounds apart
        assert speculator.stats.acceptance > 0.8
    assert (target.graphs, small.graphs) == (3, 3)


def test_the_draft_of_the_first_layers_packs_nothing_anew():
    torch._dynamo.reset()
    model = _model()
    compile = partial(qpass.compile, scheme="w8a8-dynamic", fullgraph=True, dynamic=False)
    Decoder(model, compile).warm_up()
    before = STORE.packed_count
    short = Decoder(first_layers(model, 1), compile)
    short.warm_up(steps=("likeliest",))
    assert any("layers.0" in site.name for site in qpass.explain(short.likely_step).records)
    assert STORE.packed_count == before
