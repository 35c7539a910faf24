"""What speculation gives is what the target alone gives, whatever the draft says: ends, edges, caches."""

import pytest
import tiny_decoders
import torch
from drafts import Oracle, Random, Silent
from speculating import NEW, batch_of, plain

from qpass.errors import OptionError
from qpass.runtime.decoder import Decoder
from qpass.runtime.draft import FirstOf, LayersDraft, ModelDraft
from qpass.runtime.shorten import first_layers
from qpass.runtime.speculate import Speculator

KS = [1, 2, 3, 4, 5, 7, 8, 15]


@pytest.mark.parametrize("k", [*KS, "auto"])
def test_greedy_output_is_the_targets_own(decoder, k):
    ids = tiny_decoders.prompt(7)
    wanted = plain(decoder, ids)
    text = ids[0].tolist() + wanted
    for draft in (
        Oracle([text], [7]),
        Oracle([text], [7], wrong=lambda place: place % 3 == 0),
        Oracle([text], [7], wrong=lambda place: True),
        Random(tiny_decoders.VOCAB),
        Silent(),
        ModelDraft(Decoder(tiny_decoders.build("llama"))),
        ModelDraft(Decoder(tiny_decoders.build("qwen2"))),
        LayersDraft(Decoder(first_layers(decoder.model, 1))),
        FirstOf(Silent(), Oracle([text], [7], wrong=lambda place: place % 4 == 0)),
    ):
        speculator = Speculator(decoder, draft, k=k)
        out = speculator.generate(ids, max_new_tokens=NEW)
        assert out.new_tokens[0] == wanted, type(draft).__name__
        assert out.sequences[0].tolist() == text
        assert [piece.token for piece in speculator.stats.pieces[0]] == wanted


@pytest.mark.parametrize("k", [1, 4, 15])
def test_a_draft_that_is_right_saves_steps(decoder, k):
    ids = tiny_decoders.prompt(7)
    text = ids[0].tolist() + plain(decoder, ids)
    for draft in (Oracle([text], [7]), ModelDraft(Decoder(tiny_decoders.build("qwen2")))):
        stats = (speculator := Speculator(decoder, draft, k=k)).stats
        speculator.generate(ids, max_new_tokens=NEW)
        stats = speculator.stats
        assert len(stats.rounds) == -(-(NEW - 1) // (k + 1))
        assert stats.acceptance == 1.0
        assert sum(piece.drafted for piece in stats.pieces[0]) == sum(sum(each.accepted) for each in stats.rounds)


@pytest.mark.parametrize("name", tiny_decoders.CONFIGS)
def test_every_family_verifies(name):
    model = tiny_decoders.build(name)
    decoder, ids = Decoder(model), tiny_decoders.prompt(5)
    wanted = plain(decoder, ids)
    text = ids[0].tolist() + wanted
    for draft in (
        Oracle([text], [5], wrong=lambda place: place % 5 == 0),
        LayersDraft(Decoder(first_layers(model, 1))),
    ):
        assert Speculator(decoder, draft, k=4).generate(ids, max_new_tokens=NEW).new_tokens[0] == wanted


@pytest.mark.parametrize("k", [1, 3, 8, "auto"])
def test_rows_of_a_batch_advance_alone(decoder, k):
    rows, ids, mask = batch_of((3, 12, 1, 7))
    wanted = [plain(decoder, row) for row in rows]
    texts = [row[0].tolist() + new for row, new in zip(rows, wanted, strict=True)]
    for draft in (
        Oracle(texts, [], wrong=lambda place: place % 3 == 0),
        ModelDraft(Decoder(tiny_decoders.build("llama"))),
        LayersDraft(Decoder(first_layers(decoder.model, 1))),
        Random(tiny_decoders.VOCAB),
    ):
        out = Speculator(decoder, draft, k=k).generate(ids, mask, max_new_tokens=NEW)
        assert out.new_tokens == wanted
        assert len(out.token_ms) >= NEW - 1  # a row's tokens, not those of all rows
        assert len(out.token_ms) < 2 * NEW


class _Kept(Decoder):
    """Keeps the cache that it allocated last."""

    def allocate(self, batch, length):
        self.cache = super().allocate(batch, length)
        return self.cache


def test_the_cache_holds_what_it_would_have_held_without():
    """Up to the last digits of fp32 products, which ATen rounds by the number of rows; bit for bit where kernels don't,
    see test_speculate_compiled.py."""
    rows, ids, mask = batch_of((3, 9))
    decoder = _Kept(tiny_decoders.build("qwen2"))
    Speculator(decoder).generate(ids, mask, max_new_tokens=NEW)
    without = decoder.cache
    texts = [row[0].tolist() + plain(decoder, row) for row in rows]
    for draft in (
        Oracle(texts, [], wrong=lambda place: place % 3 == 0),
        LayersDraft(Decoder(first_layers(decoder.model, 1))),
    ):
        Speculator(decoder, draft, k=5).generate(ids, mask, max_new_tokens=NEW)
        pairs = zip((*decoder.cache.keys, *decoder.cache.values), (*without.keys, *without.values), strict=True)
        for ours, theirs in pairs:
            for b, row in enumerate(rows):
                held = row.shape[1] + NEW - 1
                torch.testing.assert_close(ours[:held, b], theirs[:held, b], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", range(6))
def test_an_end_at_each_place_of_a_draft(decoder, place):
    """The end token is the target's own or any of the K drafted ones; nothing comes behind it."""
    ids = tiny_decoders.prompt(7)
    wanted = plain(decoder, ids)
    end = next(i for i in range(place, NEW) if wanted[i] not in wanted[:i])
    text = ids[0].tolist() + wanted
    for k in (1, 4, 5, 15):
        speculator = Speculator(decoder, Oracle([text], [7]), k=k)
        out = speculator.generate(ids, max_new_tokens=NEW, eos_token_id=wanted[end], pad_token_id=0)
        assert out.new_tokens[0] == wanted[: end + 1]
        stopped = speculator.generate(ids, max_new_tokens=NEW, stop=lambda row: row[-1] == wanted[end])
        assert stopped.new_tokens[0] == wanted[: end + 1]
        assert out.sequences.shape[1] == 7 + end + 1


@pytest.mark.parametrize("new", [1, 2, 3, 5, 6, 7])
def test_the_last_token_falls_into_a_draft(decoder, new):
    ids = tiny_decoders.prompt(7)
    wanted = plain(decoder, ids, new)
    text = ids[0].tolist() + plain(decoder, ids)
    assert Speculator(decoder, Oracle([text], [7]), k=4).generate(ids, max_new_tokens=new).new_tokens[0] == wanted


def test_rows_end_apart_in_abatch_of(decoder):
    rows, ids, mask = batch_of((3, 12))
    wanted = [plain(decoder, row) for row in rows]
    texts = [row[0].tolist() + new for row, new in zip(rows, wanted, strict=True)]
    end = next(t for i, t in enumerate(wanted[0][:20]) if t not in wanted[1] and t not in wanted[0][:i])
    out = Speculator(decoder, Oracle(texts, []), k=4).generate(
        ids, mask, max_new_tokens=NEW, eos_token_id=end, pad_token_id=0
    )
    assert out.new_tokens[0] == wanted[0][: wanted[0].index(end) + 1]
    assert out.new_tokens[1] == wanted[1]
    assert set(out.sequences[0, 12 + len(out.new_tokens[0]) :].tolist()) <= {0}


def test_up_to_the_last_slot_of_context_and_cache(decoder):
    """Drafts get shorter where the room ends, and the output is as long as without them."""
    context = tiny_decoders.CONTEXT
    ids = tiny_decoders.prompt(context - 20)
    wanted = plain(decoder, ids, 20)
    text = ids[0].tolist() + wanted
    for draft in (Oracle([text], []), Random(tiny_decoders.VOCAB), ModelDraft(Decoder(tiny_decoders.build("llama")))):
        assert Speculator(decoder, draft, k=15).generate(ids, max_new_tokens=20).new_tokens[0] == wanted
    short = tiny_decoders.prompt(44)
    text = short[0].tolist() + plain(decoder, short, 20)
    steps = Speculator(decoder, Oracle([text], []), k=15).stream(short, max_new_tokens=20, length=64)
    assert [token for step in steps for token in step[0]] == text[44:]


def test_tokens_stream_as_they_are_accepted_and_a_stream_can_be_left(decoder):
    ids = tiny_decoders.prompt(7)
    wanted = plain(decoder, ids)
    speculator = Speculator(decoder, Oracle([ids[0].tolist() + wanted], []), k=4)
    steps = speculator.stream(ids, max_new_tokens=NEW)
    assert [next(steps), next(steps)] == [[wanted[:1]], [wanted[1:6]]]
    with pytest.raises(OptionError, match="is generating already"):
        speculator.generate(ids, max_new_tokens=3)
    steps.close()
    assert speculator.generate(ids, max_new_tokens=NEW).new_tokens[0] == wanted
