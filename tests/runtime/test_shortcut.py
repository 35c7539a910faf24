"""A step is called past Dynamo from its second call on, and only where that is the same call."""

from functools import partial

import pytest
import tiny_decoders
import torch

import qpass
from qpass.runtime.decoder import Decoder


@pytest.fixture
def decoder():
    torch._dynamo.reset()
    model = tiny_decoders.build("qwen2").bfloat16()
    return Decoder(model, partial(qpass.compile, scheme="w8a8-dynamic", fullgraph=True, dynamic=False))


class Counted:
    """How often Dynamo was asked."""

    def __init__(self, decoder, monkeypatch):
        self.times = 0
        run = decoder._run

        def counted(step, *args):
            self.times += 1
            return run(step, *args)

        monkeypatch.setattr(decoder, "_run", counted)


def _calls(decoder, length=64, batch=1):
    """Each step's answer to fixed tokens, on a cache of its own."""
    cache = decoder.allocate(batch, length)
    ids, pad = tiny_decoders.prompt(9, seed=1).repeat(batch, 1), torch.zeros(batch, dtype=torch.int64)
    decoder.prefill(ids, pad + 9, cache)
    answers = [
        *decoder.likeliest(ids[:, :1], pad + 9, pad, cache, 10),
        *decoder.likeliest(ids[:, :3], pad + 9, pad, cache, 12),
        *decoder.verify(ids[:, :5], pad + 9, pad, cache, 14),
        *decoder.verify(ids[:, :2], pad + 9, pad, cache, 11),
        decoder.decode(ids[:, :1], pad + 9, pad, cache, 10),
        decoder.block(ids[:, :4], pad + 9, pad, cache, 13),
    ]
    return [answer.clone() for answer in answers] + [t.clone() for t in (*cache.keys, *cache.values)]


def test_the_answers_are_dynamos(decoder, monkeypatch):
    first, counted = _calls(decoder), Counted(decoder, monkeypatch)
    for _ in range(2):  # on other caches
        assert all(map(torch.equal, _calls(decoder), first))
    assert counted.times == 2, "the prompts"


def test_other_shapes_are_learned_apart(decoder, monkeypatch):
    one = _calls(decoder)
    long, both = _calls(decoder, length=256), _calls(decoder, batch=2)
    counted = Counted(decoder, monkeypatch)
    assert all(map(torch.equal, _calls(decoder, length=256), long))
    assert all(map(torch.equal, _calls(decoder, batch=2), both))
    assert all(torch.equal(b[:1], a) for a, b in zip(one[:8], both[:8], strict=True))
    assert counted.times == 2


def test_a_change_of_torchs_state_asks_dynamo(decoder, monkeypatch):
    _calls(decoder)
    counted, threads = Counted(decoder, monkeypatch), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        _calls(decoder)
    finally:
        torch.set_num_threads(threads)
    assert counted.times == 7


def test_weights_that_stay_may_change_in_place(decoder):
    """The norms' weights and the embedding are not packed: the graph reads them each call."""
    before = _calls(decoder)
    with torch.no_grad():
        for parameter in decoder.model.model.embed_tokens.parameters():
            parameter.neg_()
    after = _calls(decoder)
    fresh = _calls(Decoder(decoder.model, partial(qpass.compile, scheme="w8a8-dynamic", fullgraph=True, dynamic=False)))
    assert not torch.equal(before[-1], after[-1])
    assert all(map(torch.equal, after, fresh))


def test_what_is_not_ours_is_called_as_it_was(monkeypatch):
    decoder = Decoder(tiny_decoders.build("qwen2"))
    first, counted = _calls(decoder), Counted(decoder, monkeypatch)
    assert all(map(torch.equal, _calls(decoder), first))
    assert counted.times == 7
