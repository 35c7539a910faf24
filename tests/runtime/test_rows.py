"""A token's logits have the same bits, whether its step takes it alone or with others: exact speculation rests on it."""

from __future__ import annotations

import functools
import hashlib

import pytest
import tiny_decoders
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qpass
from qpass.cpu import detect
from qpass.kernels.plan import SERVED
from qpass.runtime.decoder import Decoder
from qpass.runtime.kv import KVCache

pytestmark = pytest.mark.skipif(detect().tier not in SERVED, reason="needs AVX2")

PROMPT, TOKENS = 70, 5  # more than one block of 64 keys


def small() -> LlamaForCausalLM:
    """SmolLM2's shape, grouped heads and a tied head, a few layers and a hundredth of its width."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny_decoders.VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=160,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def digest(logits: torch.Tensor) -> list[str]:
    """A hash of each token's bits; logits [Q, V]."""
    return [hashlib.sha256(row.contiguous().view(torch.int16).numpy().tobytes()).hexdigest() for row in logits]


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a8-g32"])
def test_one_at_a_time_and_several_at_once(scheme: str, kv_dtype: str | None) -> None:
    torch._dynamo.reset()
    model = small()
    compile = functools.partial(qpass.compile, scheme=scheme, fullgraph=True, dynamic=False)
    decoder = Decoder(model, compile, kv_dtype=kv_dtype)
    ids, pad = tiny_decoders.prompt(PROMPT + TOKENS, seed=1), torch.zeros(1, dtype=torch.int64)

    def filled() -> KVCache:
        cache = decoder.allocate(1, PROMPT + TOKENS)
        decoder.prefill(ids[:, :PROMPT], pad + PROMPT, cache)
        return cache

    one = filled()
    alone = [decoder.decode(ids[:, i : i + 1], pad + i, pad, one, i + 1) for i in range(PROMPT, PROMPT + TOKENS)]
    expected = digest(torch.cat(alone))
    for split in ([5], [2, 3], [3, 2]):
        cache, start, got = filled(), PROMPT, []
        for count in split:
            new, position = ids[:, start : start + count], torch.full((1,), start)
            start += count
            got += digest(decoder.block(new, position, pad, cache, start)[0])
        assert got == expected, split
        for a, b in zip((*one.keys, *one.values), (*cache.keys, *cache.values), strict=True):
            assert torch.equal(a, b)
