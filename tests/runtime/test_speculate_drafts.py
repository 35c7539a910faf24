"""Drafts of every shape beside one target: shorter, longer, smaller, broken, and what is refused."""

import pytest
import tiny_decoders
import torch
import transformers
from drafts import Oracle, Silent
from speculating import NEW, plain

from qpass.errors import OptionError
from qpass.runtime.decoder import Decoder
from qpass.runtime.draft import FirstOf, ModelDraft, Proposal
from qpass.runtime.sampling import Sampling
from qpass.runtime.shorten import SEEN, ShortHead, first_layers, smaller_vocabulary
from qpass.runtime.speculate import Speculator


def test_a_draft_of_a_shorter_context(decoder):
    """It proposes as far as it can; a prompt that it can't hold at all is refused with the reason."""
    config = tiny_decoders.CONFIGS["llama"]()
    config.max_position_embeddings = 40
    short = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    speculator = Speculator(decoder, ModelDraft(Decoder(short)), k=4)
    ids = tiny_decoders.prompt(20)
    assert speculator.generate(ids, max_new_tokens=NEW).new_tokens[0] == plain(decoder, ids)
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
        assert out.new_tokens[0] == plain(decoder, ids, 12)
        assert speculator.stats.acceptance == 1.0
        ids = torch.cat([out.sequences, tiny_decoders.prompt(4, seed=turn)], 1)
    for ids in (tiny_decoders.prompt(4), tiny_decoders.prompt(30)):
        assert speculator.generate(ids, max_new_tokens=12).new_tokens[0] == plain(decoder, ids, 12)
        assert speculator.stats.acceptance == 1.0


def test_a_draft_reads_what_others_proposed_in_pieces(decoder):
    """Forty tokens that another draft found are new to the model behind it."""
    ids = tiny_decoders.prompt(9)
    text = ids[0].tolist() + plain(decoder, ids, 80)

    class Half(Oracle):
        def propose(self, rows, k):
            return super().propose(rows, k) if len(rows[0]) < 60 else [[]]

    behind = ModelDraft(Decoder(tiny_decoders.build("qwen2")))
    speculator = Speculator(decoder, FirstOf(Half([text], []), behind), k=12)
    # the model is asked once at the start, so that it holds the prompt
    behind.propose([text[:10]], 1)
    assert speculator.generate(ids, max_new_tokens=80).new_tokens[0] == text[9:]
    assert speculator.stats.acceptance == 1.0


def test_a_smaller_head_proposes_its_own_tokens_and_those_of_the_text(decoder):
    ids = tiny_decoders.prompt(9)
    wanted = plain(decoder, ids)
    for how in (Sampling(), Sampling(temperature=1.0)):
        small = smaller_vocabulary(decoder.model, 50)
        assert small.lm_head.weight.data_ptr() == decoder.model.lm_head.weight.data_ptr()
        speculator = Speculator(decoder, ModelDraft(Decoder(small)), k=4)
        out = speculator.generate(ids, max_new_tokens=NEW, sampling=how, generator=torch.Generator().manual_seed(0))
        text = out.new_tokens[0]
        proposed = [p for piece in speculator.stats.pieces[0] for p in piece.rejected]
        assert proposed
        assert {p for p in proposed if p >= 50} <= {*ids[0].tolist(), *text}
        assert how.temperature or text == wanted
    assert max(wanted) >= 50
    assert decoder.model.lm_head.out_features == tiny_decoders.VOCAB


@pytest.mark.parametrize("bias", [False, True])
def test_a_short_head_gives_the_logits_of_what_it_knows(bias):
    torch.manual_seed(0)
    head, x = torch.nn.Linear(8, 1000, bias=bias).requires_grad_(False), torch.randn(2, 3, 8)
    short, wanted = ShortHead(head, 100), head(x)
    assert torch.allclose(short(x)[..., :100], wanted[..., :100], atol=1e-6)
    assert bool((short(x)[..., 100:] == -torch.inf).all())
    short.see([3, 700, 99, 999, 700])
    known = torch.zeros(1000, dtype=torch.bool)
    known[[*range(100), 700, 999]] = True
    assert torch.allclose(short(x)[..., known], wanted[..., known], atol=1e-6)
    assert bool((short(x)[..., ~known] == -torch.inf).all())


def test_a_short_head_forgets_what_came_last_longest_ago():
    head, x = torch.nn.Linear(8, 1000).requires_grad_(False), torch.randn(1, 8)
    short = ShortHead(head, 100)
    short.see(range(100, 100 + SEEN))
    short.see([100])  # comes again, so 101 is the next to go
    short.see([900, 901])
    logits = short(x)[0]
    gone = {token for token in range(100, 100 + SEEN) if logits[token] == -torch.inf}
    assert gone == {101, 102}
    assert torch.allclose(logits[[100, 900, 901]], head(x)[0, [100, 900, 901]], atol=1e-6)
    short.see(range(300, 300 + 2 * SEEN))  # more than it has room for: the last ones
    assert {t for t in range(100, 1000) if short(x)[0, t] > -torch.inf} == set(range(300 + SEEN, 300 + 2 * SEEN))


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
        assert how.temperature or out.new_tokens[0] == plain(decoder, ids)


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
    assert speculator.generate(ids, max_new_tokens=NEW).new_tokens[0] == plain(decoder, ids)
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
