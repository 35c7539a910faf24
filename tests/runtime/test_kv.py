"""The static cache under a model's forward: positions a row, rollback, padding, sliding windows, refusals."""

import pytest
import tiny_decoders
import torch
import transformers as tf

from qpass.errors import OptionError, UnsupportedError
from qpass.runtime import attention
from qpass.runtime.kv import KVCache
from qpass.runtime.step import make_prompt, make_step, probe, refuse
from tests.support.tolerance import sqnr_db

CLOSE = 2e-5  # fp32, logits of size 1 to 10: the order of sums differs, nothing else


def _run(model, step, *args):
    with torch.no_grad(), attention.swapped(attention.configs_of(model)):
        return step(*args)


@pytest.mark.parametrize("name", tiny_decoders.CONFIGS)
def test_rows_at_their_own_positions_give_the_logits_of_a_plain_forward(name):
    """Prompts of two lengths, a token, tokens that are rejected, and others in their place at ragged positions."""
    model = tiny_decoders.build(name)
    ids = tiny_decoders.prompt(14, batch=2)
    count, pad = torch.tensor([5, 8]), torch.tensor([0, 0])
    with torch.no_grad():
        wanted = model(ids).logits
    cache = KVCache.allocate(probe(model), 2, 32)
    part = cache.first(8)
    step = make_step(model, last_only=False)
    last = _run(model, make_prompt(model), ids[:, :8], count, part.keys, part.values)
    one = _run(model, step, torch.stack([ids[0, 5:6], ids[1, 8:9]]), count, pad, cache.keys, cache.values)
    rejected = tiny_decoders.prompt(3, seed=5, batch=2)
    _run(model, step, rejected, count + 1, pad, cache.keys, cache.values)
    ragged = torch.stack([ids[0, 6:10], ids[1, 8:12]])
    four = _run(model, step, ragged, torch.tensor([6, 8]), pad, cache.keys, cache.values)
    for got, row, place in ((last[0], 0, 4), (last[1], 1, 7), (one[0, 0], 0, 5), (one[1, 0], 1, 8)):
        torch.testing.assert_close(got, wanted[row][place], atol=CLOSE, rtol=CLOSE)
    torch.testing.assert_close(four[0], wanted[0][6:10], atol=CLOSE, rtol=CLOSE)
    torch.testing.assert_close(four[1], wanted[1][8:12], atol=CLOSE, rtol=CLOSE)


def test_slots_in_front_of_a_row_may_be_empty():
    """A row that starts at slot 3 gets the positions and the logits of one that starts at slot 0."""
    model = tiny_decoders.build("llama")
    ids, pad = tiny_decoders.prompt(9), torch.tensor([3])
    with torch.no_grad():
        wanted = model(ids).logits
    cache, step = KVCache.allocate(probe(model), 1, 16), make_step(model, last_only=False)
    got = [_run(model, step, ids[:, i : i + 3], pad + i, pad, cache.keys, cache.values) for i in (0, 3, 6)]
    torch.testing.assert_close(torch.cat(got, 1), wanted, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("int8", [False, True])
def test_after_a_rejection_the_cache_holds_what_it_would_have_held_without(int8):
    model = tiny_decoders.build("llama")
    ids = tiny_decoders.prompt(12)
    pad, step = torch.zeros(1, dtype=torch.int64), make_step(model, last_only=True)
    caches = []
    for wrong in (None, tiny_decoders.prompt(4, seed=9)):
        cache = KVCache.allocate(probe(model), 1, 16, int8=int8)
        _run(model, step, ids[:, :6], torch.tensor([0]), pad, cache.keys, cache.values)
        if wrong is not None:
            _run(model, step, wrong, torch.tensor([6]), pad, cache.keys, cache.values)
        _run(model, step, ids[:, 6:], torch.tensor([6]), pad, cache.keys, cache.values)
        caches.append(cache)
    plain, speculated = caches
    for a, b in zip((*plain.keys, *plain.values), (*speculated.keys, *speculated.values), strict=True):
        assert torch.equal(a[:12], b[:12])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_our_attention_equals_sdpa(name):
    """The same plain forward under transformers' attention and under ours."""
    model = tiny_decoders.build(name)
    ids = tiny_decoders.prompt(11, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        with attention.swapped(attention.configs_of(model)):
            got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[0, 4:], wanted[0, 4:], atol=CLOSE, rtol=CLOSE)
    torch.testing.assert_close(got[1], wanted[1], atol=CLOSE, rtol=CLOSE)


def test_the_attention_of_the_config_is_put_back():
    model = tiny_decoders.build("llama")
    before = model.config._attn_implementation
    with attention.swapped(attention.configs_of(model)):
        assert model.config._attn_implementation == attention.NAME
    assert model.config._attn_implementation == before


def test_int8_keys_and_values_cost_little():
    """The logits of a prompt and of tokens behind it, at ragged positions; half a step of 1/127 is 45 dB below the
    largest value of a head, and two layers of it leave more than 25."""
    model = tiny_decoders.build("llama")
    ids = tiny_decoders.prompt(14, batch=2)
    count, pad = torch.tensor([5, 8]), torch.tensor([0, 0])
    logits = []
    for int8 in (False, True):
        cache = KVCache.allocate(probe(model), 2, 32, int8=int8)
        part = cache.first(8)
        last = _run(model, make_prompt(model), ids[:, :8], count, part.keys, part.values)
        ragged = torch.stack([ids[0, 5:9], ids[1, 7:11]])
        four = _run(
            model, make_step(model, last_only=False), ragged, torch.tensor([5, 7]), pad, cache.keys, cache.values
        )
        logits.append(torch.cat([last[:, None], four], 1))
    assert sqnr_db(*logits) > 25
    assert not torch.equal(*logits)


def test_an_int8_cache_takes_a_byte_a_value_and_a_scale_a_head():
    shapes = probe(tiny_decoders.build("llama"))
    assert KVCache.allocate(shapes, 3, 64, int8=True).bytes == 2 * 2 * 3 * 64 * 2 * (8 + 4)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma2"])
def test_a_prompt_may_be_read_in_pieces(name):
    """Attention over the prompt's own keys and over the cached ones is the same, with int8 too."""
    model = tiny_decoders.build(name)
    ids, pad = tiny_decoders.prompt(12), torch.zeros(1, dtype=torch.int64)
    for int8 in (False, True):
        whole, pieces = (KVCache.allocate(probe(model), 1, 12, int8=int8) for _ in range(2))
        one = _run(model, make_prompt(model), ids, pad + 12, whole.keys, whole.values)
        step = make_step(model, last_only=True)
        for begin, end in ((0, 5), (5, 6), (6, 12)):
            two = _run(model, step, ids[:, begin:end], torch.tensor([begin]), pad, pieces.keys, pieces.values)
        torch.testing.assert_close(one, two, atol=CLOSE if not int8 else 0.05, rtol=CLOSE)


def test_bytes_and_room():
    cache = KVCache.allocate(probe(tiny_decoders.build("llama")), 3, 64)
    assert (cache.batch, cache.length) == (3, 64)
    assert cache.bytes == 2 * 2 * 3 * 64 * 2 * 8 * 4  # keys and values, layers, rows, tokens, heads, width, fp32
    cache.check_room(60, 4)
    with pytest.raises(OptionError, match="holds 64 tokens, 60 are used and 5 more"):
        cache.check_room(60, 5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: tf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4), "ALiBi"),
        (lambda: tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1), "recurrent state"),
        (
            lambda: tf.FalconConfig(
                vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True
            ),
            "ALiBi",
        ),
    ],
)
def test_models_that_cannot_are_refused_with_the_reason(config, reason):
    model = tf.AutoModelForCausalLM.from_config(config()).eval()
    with pytest.raises(UnsupportedError, match=reason):
        probe(model)


def test_what_is_no_language_model_is_refused():
    assert "not a transformers model" in refuse(torch.nn.Linear(2, 2))
    t5 = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=97, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    assert "encoder-decoder" in refuse(t5)
