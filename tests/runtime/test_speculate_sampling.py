"""Sampled speculation has the target's own distribution, and processors see each position."""

import pytest
import tiny_decoders
import torch
from drafts import Oracle, Random
from speculating import NEW, plain

from qpass.runtime.decoder import Decoder
from qpass.runtime.draft import FirstOf, LayersDraft, ModelDraft
from qpass.runtime.sampling import Sampling
from qpass.runtime.shorten import first_layers
from qpass.runtime.speculate import Speculator


def test_penalties_and_processors_are_seen_position_by_position(decoder):
    class NotTwice:
        def __call__(self, tokens, logits):
            return logits.scatter(1, tokens[:, -2:], -torch.inf)

    ids = tiny_decoders.prompt(7)
    how = Sampling(repetition_penalty=1.7, processors=(NotTwice(),))
    wanted = plain(decoder, ids, sampling=how)
    assert wanted != plain(decoder, ids)
    text = ids[0].tolist() + wanted
    for draft in (
        Oracle([text], [], wrong=lambda place: place % 4 == 0),
        ModelDraft(Decoder(tiny_decoders.build("llama"))),
        LayersDraft(Decoder(first_layers(decoder.model, 1))),
    ):
        assert Speculator(decoder, draft, k=5).generate(ids, max_new_tokens=NEW, sampling=how).new_tokens[0] == wanted


class EveryOther:
    """Has a guess for every other row of a batch, shorter than asked for and certain of it."""

    def propose(self, rows, k):
        return [[(sum(row) * 7) % 90 + 3][:k] if index % 2 else [] for index, row in enumerate(rows)]


@pytest.mark.parametrize("kind", ["drawn", "certain", "model", "layers", "in turn"])
def test_sampled_tokens_have_the_targets_distribution(decoder, kind):
    """The first two tokens behind a prompt, drawn 4000 times in one batch, against the product of the target's own
    distributions: a chi-square test at 1e-4 over the pairs that are expected at least five times, and the rest."""
    ids = tiny_decoders.prompt(6)
    how, draws = Sampling(temperature=1.3, top_k=6), 4000
    draft = {
        "drawn": lambda: Random(tiny_decoders.VOCAB, drawn=True),
        "certain": lambda: Random(tiny_decoders.VOCAB),
        "model": lambda: ModelDraft(Decoder(tiny_decoders.build("llama"))),
        "layers": lambda: LayersDraft(Decoder(first_layers(decoder.model, 1))),
        "in turn": lambda: FirstOf(EveryOther(), ModelDraft(Decoder(tiny_decoders.build("llama")))),
    }[kind]()
    from qpass.runtime.sampling import probabilities

    with torch.no_grad():
        first = probabilities(decoder.model(ids).logits[:, -1], how)[0].double()
        pairs = {}
        for token in first.nonzero()[:, 0].tolist():
            follow = torch.cat([ids, torch.tensor([[token]])], 1)
            second = probabilities(decoder.model(follow).logits[:, -1], how)[0].double()
            for other in second.nonzero()[:, 0].tolist():
                pairs[(token, other)] = float(first[token] * second[other])
    speculator = Speculator(decoder, draft, k=2)
    # the token behind the prompt is drawn without a draft, so the pairs are made of the two behind it
    start = ids[:, :-1].expand(draws, -1)
    forced = ids[0, -1].item()

    class First:
        """The first token is the prompt's last; from then on nothing is changed."""

        def __call__(self, tokens, logits):
            if tokens.shape[1] >= 6:
                return logits
            return torch.where(torch.arange(logits.shape[1]) == forced, 0.0, -torch.inf).expand_as(logits)

    out = speculator.generate(
        start,
        max_new_tokens=3,
        eos_token_id=(),
        generator=torch.Generator().manual_seed(5),
        sampling=Sampling(temperature=1.3, top_k=6, processors=(First(),)),
    )
    seen: dict[tuple[int, int], int] = {}
    for row in out.new_tokens:
        assert row[0] == forced
        seen[(row[1], row[2])] = seen.get((row[1], row[2]), 0) + 1
    assert set(seen) <= set(pairs)
    often = {pair: p * draws for pair, p in pairs.items() if p * draws >= 5}
    rest = draws - sum(often.values())
    chi = sum((seen.get(pair, 0) - n) ** 2 / n for pair, n in often.items())
    if rest >= 5:
        chi += (draws - sum(seen.get(pair, 0) for pair in often) - rest) ** 2 / rest
    degrees = len(often) - (rest < 5)
    tail = torch.special.gammaincc(torch.tensor(degrees / 2), torch.tensor(chi / 2))  # of chi-square
    assert tail > 1e-4, (chi, degrees)
    if kind in ("drawn", "model", "in turn"):  # one layer of random weights has another six tokens than two
        assert speculator.stats.acceptance > 0


def test_a_seed_gives_the_same_text(decoder):
    ids = tiny_decoders.prompt(6)
    how = Sampling(temperature=1.2, top_p=0.95)
    speculator = Speculator(decoder, ModelDraft(Decoder(tiny_decoders.build("llama"))), k=3)

    def draw(seed):
        return speculator.generate(
            ids, max_new_tokens=NEW, sampling=how, generator=torch.Generator().manual_seed(seed)
        ).new_tokens

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
