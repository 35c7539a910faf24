"""Generation against transformers' own, token for token; graphs counted; ends and edges."""

from functools import partial

import pytest
import tiny_decoders
import torch

from qpass.errors import OptionError
from qpass.runtime.decoder import LENGTH_STEP, Decoder, left_padding
from qpass.runtime.sampling import Sampling
from qpass.runtime.speculate import Speculator

NEW = 24


def _reference(model, ids, new=NEW, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new)


@pytest.mark.parametrize("name", tiny_decoders.CONFIGS)
def test_greedy_equals_generate(name):
    model = tiny_decoders.build(name)
    decoder = Speculator(Decoder(model))
    for length in (1, 2, 9):
        ids = tiny_decoders.prompt(length, seed=length)
        out = decoder.generate(ids, max_new_tokens=NEW)
        assert torch.equal(out.sequences, _reference(model, ids))
        assert out.new_tokens[0] == out.sequences[0, length:].tolist()
        assert len(out.token_ms) == NEW - 1


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "falcon-rotary"])
def test_left_padded_rows_equal_themselves_alone(name):
    model = tiny_decoders.build(name)
    decoder = Speculator(Decoder(model))
    rows = [tiny_decoders.prompt(n, seed=n) for n in (3, 12, 7, 1)]
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows])
    together = decoder.generate(ids, mask, max_new_tokens=NEW)
    for row, new in zip(rows, together.new_tokens, strict=True):
        assert new == decoder.generate(row, max_new_tokens=NEW).new_tokens[0]


def test_graphs_stay_two_over_prompt_lengths_and_cache_lengths():
    torch._dynamo.reset()
    model = tiny_decoders.build("qwen2")
    decoder = Speculator(Decoder(model, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=False)))
    decoder.decoder.warm_up()
    assert decoder.decoder.graphs == 2
    for length in (1, 2, 5, 8, LENGTH_STEP - 1, LENGTH_STEP, LENGTH_STEP + 1, 130):
        ids = tiny_decoders.prompt(length, seed=length)
        out = decoder.generate(ids, max_new_tokens=NEW)
        assert torch.equal(out.sequences, _reference(model, ids)), length
        assert (out.graphs, out.compile_seconds) == (2, 0.0)
    ids = tiny_decoders.prompt(6, batch=2)
    assert decoder.generate(ids, max_new_tokens=3).graphs == 4  # another batch size: two more, and no more than that
    assert decoder.generate(tiny_decoders.prompt(9, batch=2), max_new_tokens=70).graphs == 4


@pytest.mark.parametrize("name", tiny_decoders.CONFIGS)
def test_every_family_is_two_graphs(name):
    """Whole, for any length: no graph break, no length that the graph was made for."""
    torch._dynamo.reset()
    model = tiny_decoders.build(name)
    decoder = Speculator(Decoder(model, lambda f: torch.compile(f, backend="eager", fullgraph=True, dynamic=False)))
    decoder.decoder.warm_up()
    for length in (2, 9, LENGTH_STEP + 1):
        ids = tiny_decoders.prompt(length, seed=length)
        assert torch.equal(decoder.generate(ids, max_new_tokens=4).sequences, _reference(model, ids, 4))
    assert decoder.decoder.graphs == 2


def test_two_decoders_do_not_share_a_recompile_limit():
    torch._dynamo.reset()
    model = tiny_decoders.build("llama")
    ids = tiny_decoders.prompt(4)
    wanted = _reference(model, ids, 2)
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            decoder = Speculator(
                Decoder(model, lambda f: torch.compile(f, backend="eager", fullgraph=True, dynamic=False))
            )
            assert torch.equal(decoder.generate(ids, max_new_tokens=2).sequences, wanted)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_inductor_gives_the_same_tokens(name):
    torch._dynamo.reset()
    model = tiny_decoders.build(name)
    decoder = Speculator(Decoder(model, lambda f: torch.compile(f, backend="inductor", fullgraph=True, dynamic=False)))
    seconds = decoder.decoder.warm_up()
    assert 0 < decoder.decoder.compile_seconds <= seconds
    for length in (2, 65):
        ids = tiny_decoders.prompt(length, seed=length)
        assert torch.equal(decoder.generate(ids, max_new_tokens=NEW).sequences, _reference(model, ids))


def test_int8_keys_and_values_through_inductor():
    """The compiled steps compute what the eager ones do, in two graphs."""
    torch._dynamo.reset()
    model = tiny_decoders.build("gemma3")
    eager = Speculator(Decoder(model, kv_dtype="int8"))
    compile = partial(torch.compile, backend="inductor", fullgraph=True, dynamic=False)
    decoder = Speculator(Decoder(model, compile, kv_dtype="int8"))
    decoder.decoder.warm_up()
    for length in (2, 65):
        ids = tiny_decoders.prompt(length, seed=length)
        wanted = eager.generate(ids, max_new_tokens=NEW).sequences
        assert torch.equal(decoder.generate(ids, max_new_tokens=NEW).sequences, wanted)
    assert decoder.decoder.graphs == 2


def test_a_cache_of_another_type_is_refused():
    with pytest.raises(OptionError, match="kv_dtype is 'fp8'; accepted: None"):
        Decoder(tiny_decoders.build("llama"), kv_dtype="fp8")


def test_eos_ends_a_row_and_pads_it():
    model = tiny_decoders.build("llama")
    decoder = Speculator(Decoder(model))
    ids = tiny_decoders.prompt(5, batch=2)
    free = decoder.generate(ids, max_new_tokens=8).new_tokens
    place = next(i for i in range(1, 8) if free[0][i] not in free[0][:i] and free[0][i] not in free[1][: i + 1])
    out = decoder.generate(ids, max_new_tokens=8, eos_token_id=[96, free[0][place]], pad_token_id=0)
    assert out.new_tokens[0] == free[0][: place + 1]
    assert out.sequences[0, 5:].tolist() == free[0][: place + 1] + [0] * (out.sequences.shape[1] - 5 - place - 1)
    assert out.new_tokens[1][: place + 1] == free[1][: place + 1]


def test_eos_at_the_first_token():
    decoder = Speculator(Decoder(tiny_decoders.build("llama")))
    ids = tiny_decoders.prompt(5)
    first = decoder.generate(ids, max_new_tokens=1).new_tokens[0][0]
    out = decoder.generate(ids, max_new_tokens=8, eos_token_id=first)
    assert out.new_tokens == [[first]]
    assert out.token_ms == []


def test_tokens_stream_as_they_come():
    decoder = Speculator(Decoder(tiny_decoders.build("llama")))
    ids = tiny_decoders.prompt(5)
    seen: list[int] = []
    stream = decoder.stream(ids, max_new_tokens=6)
    seen.extend(next(stream)[0])
    assert len(seen) == 1
    seen.extend(token for step in stream for token in step[0])
    assert seen == decoder.generate(ids, max_new_tokens=6).new_tokens[0]


def test_sampling_is_repeatable_with_a_seed_and_differs_without():
    decoder = Speculator(Decoder(tiny_decoders.build("llama")))
    ids = tiny_decoders.prompt(5)
    how = Sampling(temperature=1.5, top_k=40, top_p=0.95)

    def draw(seed):
        return decoder.generate(
            ids, max_new_tokens=20, sampling=how, generator=torch.Generator().manual_seed(seed)
        ).new_tokens

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_repetition_penalty_sees_the_tokens_so_far():
    model = tiny_decoders.build("llama")
    ids = tiny_decoders.prompt(5)
    out = Speculator(Decoder(model)).generate(ids, max_new_tokens=NEW, sampling=Sampling(repetition_penalty=1.8))
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, repetition_penalty=1.8
    )
    assert torch.equal(out.sequences, wanted)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, "the prompt is empty"),
        (torch.tensor([[3, 97]]), {}, "token 97 is not in the vocabulary of 97 tokens"),
        (torch.tensor([[3, -1]]), {}, "token -1 is not in the vocabulary"),
        (tiny_decoders.prompt(160), {"max_new_tokens": 1}, "prompt has 160 tokens; the model's context is 160"),
        (tiny_decoders.prompt(150), {"max_new_tokens": 20}, "at most 10 new tokens fit"),
        (tiny_decoders.prompt(5), {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (tiny_decoders.prompt(5), {"length": 64, "max_new_tokens": 100}, "the cache is full: it holds 64"),
        (tiny_decoders.prompt(5)[0], {}, r"shape \(5,\); accepted: \[batch, tokens\]"),
        (tiny_decoders.prompt(3), {"attention_mask": torch.tensor([[1, 1, 0]])}, "padded on the left"),
        (tiny_decoders.prompt(3), {"attention_mask": torch.tensor([[1, 0, 1]])}, "padded on the left"),
        (tiny_decoders.prompt(3), {"attention_mask": torch.tensor([[0, 0, 0]])}, "at least one"),
        (tiny_decoders.prompt(3), {"attention_mask": torch.ones(1, 4)}, "attention_mask has shape"),
    ],
)
def test_edges_are_errors_that_say_what_is_wrong(ids, options, message):
    decoder = Speculator(Decoder(tiny_decoders.build("llama")))
    with pytest.raises(OptionError, match=message):
        list(decoder.stream(ids, **options))


def test_left_padding_is_counted():
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    assert left_padding(tiny_decoders.prompt(3, batch=2), mask).tolist() == [2, 0]
    assert left_padding(tiny_decoders.prompt(3, batch=2), None).tolist() == [0, 0]
