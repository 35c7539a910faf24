"""What speculation gives is what the target alone gives, whatever the draft says; ends and edges; caches; errors."""

import pytest
import tiny_decoders
import torch
import transformers
from drafts import Oracle, Random, Silent

from qpass.errors import OptionError
from qpass.runtime.decoder import Decoder
from qpass.runtime.draft import FirstOf, LayersDraft, ModelDraft, Proposal
from qpass.runtime.sampling import Sampling
from qpass.runtime.shorten import first_layers, smaller_vocabulary
from qpass.runtime.speculate import Speculator

NEW = 40
KS = [1, 2, 3, 4, 5, 7, 8, 15]


def _batch(lengths):
    """Left-padded prompts and their mask."""
    rows = [tiny_decoders.prompt(n, seed=n) for n in lengths]
    longest = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows])
    return rows, ids, mask


def _plain(decoder, ids, new=NEW, **options):
    return Speculator(decoder).generate(ids, max_new_tokens=new, **options).new_tokens[0]


@pytest.fixture(scope="module")
def decoder():
    return Decoder(tiny_decoders.build("qwen2"))


@pytest.mark.parametrize("k", [*KS, "auto"])
def test_greedy_output_is_the_targets_own(decoder, k):
    ids = tiny_decoders.prompt(7)
    wanted = _plain(decoder, ids)
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
    text = ids[0].tolist() + _plain(decoder, ids)
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
    wanted = _plain(decoder, ids)
    text = ids[0].tolist() + wanted
    for draft in (
        Oracle([text], [5], wrong=lambda place: place % 5 == 0),
        LayersDraft(Decoder(first_layers(model, 1))),
    ):
        assert Speculator(decoder, draft, k=4).generate(ids, max_new_tokens=NEW).new_tokens[0] == wanted


@pytest.mark.parametrize("k", [1, 3, 8, "auto"])
def test_rows_of_a_batch_advance_alone(decoder, k):
    rows, ids, mask = _batch((3, 12, 1, 7))
    wanted = [_plain(decoder, row) for row in rows]
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
    rows, ids, mask = _batch((3, 9))
    decoder = _Kept(tiny_decoders.build("qwen2"))
    Speculator(decoder).generate(ids, mask, max_new_tokens=NEW)
    plain = decoder.cache
    texts = [row[0].tolist() + _plain(decoder, row) for row in rows]
    for draft in (
        Oracle(texts, [], wrong=lambda place: place % 3 == 0),
        LayersDraft(Decoder(first_layers(decoder.model, 1))),
    ):
        Speculator(decoder, draft, k=5).generate(ids, mask, max_new_tokens=NEW)
        pairs = zip((*decoder.cache.keys, *decoder.cache.values), (*plain.keys, *plain.values), strict=True)
        for ours, theirs in pairs:
            for b, row in enumerate(rows):
                held = row.shape[1] + NEW - 1
                torch.testing.assert_close(ours[:held, b], theirs[:held, b], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", range(6))
def test_an_end_at_each_place_of_a_draft(decoder, place):
    """The end token is the target's own or any of the K drafted ones; nothing comes behind it."""
    ids = tiny_decoders.prompt(7)
    wanted = _plain(decoder, ids)
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
    wanted = _plain(decoder, ids, new)
    text = ids[0].tolist() + _plain(decoder, ids)
    assert Speculator(decoder, Oracle([text], [7]), k=4).generate(ids, max_new_tokens=new).new_tokens[0] == wanted


def test_rows_end_apart_in_a_batch(decoder):
    rows, ids, mask = _batch((3, 12))
    wanted = [_plain(decoder, row) for row in rows]
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
    wanted = _plain(decoder, ids, 20)
    text = ids[0].tolist() + wanted
    for draft in (Oracle([text], []), Random(tiny_decoders.VOCAB), ModelDraft(Decoder(tiny_decoders.build("llama")))):
        assert Speculator(decoder, draft, k=15).generate(ids, max_new_tokens=20).new_tokens[0] == wanted
    short = tiny_decoders.prompt(44)
    text = short[0].tolist() + _plain(decoder, short, 20)
    steps = Speculator(decoder, Oracle([text], []), k=15).stream(short, max_new_tokens=20, length=64)
    assert [token for step in steps for token in step[0]] == text[44:]


def test_a_draft_of_a_shorter_context(decoder):
    """It proposes as far as it can; a prompt that it can't hold at all is refused with the reason."""
    config = tiny_decoders.CONFIGS["llama"]()
    config.max_position_embeddings = 40
    short = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    speculator = Speculator(decoder, ModelDraft(Decoder(short)), k=4)
    ids = tiny_decoders.prompt(20)
    assert speculator.generate(ids, max_new_tokens=NEW).new_tokens[0] == _plain(decoder, ids)
    drafted = [sum(each.drafted) for each in speculator.stats.rounds]
    assert drafted[0] == 4
    assert drafted[-1] == 0
    with pytest.raises(OptionError, match="LlamaForCausalLM was made for 40 tokens and the text has 51"):
        speculator.generate(tiny_decoders.prompt(50), max_new_tokens=4)


def test_a_conversation_goes_on_with_the_same_draft(decoder):
    """A draft that holds one text is asked about another, a longer one and a shorter one."""
    draft = ModelDraft(Decoder(tiny_decoders.build("qwen2")))
    speculator = Speculator(decoder, draft, k=4)
    ids = tiny_decoders.prompt(9)
    for turn in range(3):
        out = speculator.generate(ids, max_new_tokens=12)
        assert out.new_tokens[0] == _plain(decoder, ids, 12)
        assert speculator.stats.acceptance == 1.0
        ids = torch.cat([out.sequences, tiny_decoders.prompt(4, seed=turn)], 1)
    for ids in (tiny_decoders.prompt(4), tiny_decoders.prompt(30)):
        assert speculator.generate(ids, max_new_tokens=12).new_tokens[0] == _plain(decoder, ids, 12)
        assert speculator.stats.acceptance == 1.0


def test_a_draft_reads_what_others_proposed_in_pieces(decoder):
    """Forty tokens that another draft found are new to the model behind it."""
    ids = tiny_decoders.prompt(9)
    text = ids[0].tolist() + _plain(decoder, ids, 80)

    class Half(Oracle):
        def propose(self, rows, k):
            return super().propose(rows, k) if len(rows[0]) < 60 else [[]]

    behind = ModelDraft(Decoder(tiny_decoders.build("qwen2")))
    speculator = Speculator(decoder, FirstOf(Half([text], []), behind), k=12)
    # the model is asked once at the start, so that it holds the prompt
    behind.propose([text[:10]], 1)
    assert speculator.generate(ids, max_new_tokens=80).new_tokens[0] == text[9:]
    assert speculator.stats.acceptance == 1.0


def test_a_smaller_head_proposes_its_own_tokens_only(decoder):
    small = smaller_vocabulary(tiny_decoders.build("qwen2"), 50)
    assert small.get_output_embeddings().weight.data_ptr() == decoder.model.get_output_embeddings().weight.data_ptr()
    speculator = Speculator(decoder, ModelDraft(Decoder(small)), k=4)
    ids = tiny_decoders.prompt(9)
    assert speculator.generate(ids, max_new_tokens=NEW).new_tokens[0] == _plain(decoder, ids)
    proposed = [p for piece in speculator.stats.pieces[0] for p in piece.rejected]
    assert proposed
    assert max(proposed) < 50 <= max(_plain(decoder, ids))
    assert decoder.model.lm_head.out_features == tiny_decoders.VOCAB


def test_a_draft_with_more_tokens_than_the_target(decoder):
    config = tiny_decoders.CONFIGS["llama"]()
    config.vocab_size = 200
    torch.manual_seed(1)
    wide = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = tiny_decoders.prompt(9)
    for how in (Sampling(), Sampling(temperature=1.0)):
        speculator = Speculator(decoder, ModelDraft(Decoder(wide)), k=4)
        out = speculator.generate(ids, max_new_tokens=NEW, sampling=how, generator=torch.Generator().manual_seed(0))
        assert max(out.new_tokens[0]) < tiny_decoders.VOCAB
        assert how.temperature or out.new_tokens[0] == _plain(decoder, ids)


def test_penalties_and_processors_are_seen_position_by_position(decoder):
    class NotTwice:
        def __call__(self, tokens, logits):
            return logits.scatter(1, tokens[:, -2:], -torch.inf)

    ids = tiny_decoders.prompt(7)
    how = Sampling(repetition_penalty=1.7, processors=(NotTwice(),))
    wanted = _plain(decoder, ids, sampling=how)
    assert wanted != _plain(decoder, ids)
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


def test_tokens_stream_as_they_are_accepted_and_a_stream_can_be_left(decoder):
    ids = tiny_decoders.prompt(7)
    wanted = _plain(decoder, ids)
    speculator = Speculator(decoder, Oracle([ids[0].tolist() + wanted], []), k=4)
    steps = speculator.stream(ids, max_new_tokens=NEW)
    assert [next(steps), next(steps)] == [[wanted[:1]], [wanted[1:6]]]
    with pytest.raises(OptionError, match="is generating already"):
        speculator.generate(ids, max_new_tokens=3)
    steps.close()
    assert speculator.generate(ids, max_new_tokens=NEW).new_tokens[0] == wanted


def test_a_draft_that_breaks_leaves_everything_usable(decoder):
    class Broken(Decoder):
        armed = True

        def likeliest(self, *args):
            if self.armed:
                self.armed = False
                raise KeyboardInterrupt
            return super().likeliest(*args)

    ids = tiny_decoders.prompt(7)
    speculator = Speculator(decoder, ModelDraft(Broken(tiny_decoders.build("qwen2"))), k=4)
    with pytest.raises(KeyboardInterrupt):
        speculator.generate(ids, max_new_tokens=NEW)
    assert speculator.generate(ids, max_new_tokens=NEW).new_tokens[0] == _plain(decoder, ids)
    assert speculator.stats.acceptance == 1.0


class _Says:
    def __init__(self, what):
        self.what = what

    def propose(self, rows, k):
        return self.what


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[3], [4]], r"_Says.propose gave tokens of shape \(2, 1\) and type torch.int64 for 1 rows"),
        (torch.zeros(1, 3), "torch.float32 for 1 rows"),
        (torch.zeros(3, dtype=torch.int64), r"shape \(3,\)"),
        ([[97]], "gave token 97; the target's vocabulary has 97"),
        (
            Proposal(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 5)),
            r"probs of shape \(1, 2, 5\); accepted: \(1, 2, 97\)",
        ),
    ],
)
def test_a_proposal_that_cannot_be_one(decoder, given, message):
    with pytest.raises(OptionError, match=message):
        Speculator(decoder, _Says(given), k=4).generate(tiny_decoders.prompt(5), max_new_tokens=5)


@pytest.mark.parametrize("k", [-1, 16, 2.5, "many"])
def test_k_out_of_range(decoder, k):
    with pytest.raises(OptionError, match=r"accepted: 'auto' or a whole number from 0 to 15"):
        Speculator(decoder, Silent(), k=k)


def test_a_draft_without_propose(decoder):
    with pytest.raises(OptionError, match="needs a method propose"):
        Speculator(decoder, "ngram")


@pytest.mark.parametrize("count", [0, 2, 7])
def test_layers_out_of_range(decoder, count):
    with pytest.raises(OptionError, match="the target has 2 layers; accepted: 1 to 1"):
        first_layers(decoder.model, count)
