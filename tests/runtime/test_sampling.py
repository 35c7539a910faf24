"""Our warpers against transformers', and draws against the distribution they come from."""

import pytest
import torch
from transformers.generation.logits_process import (
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from qpass.errors import OptionError
from qpass.runtime.sampling import Sampling, block_probabilities, choose, eos_ids, probabilities, sampling_of


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1, 0), (7, 1, 0), (0, 0.8, 0), (9, 0.6, 0), (0, 1, 0.1), (12, 0.9, 0.05)]
)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_distribution_is_transformers_own(temperature, top_k, top_p, min_p, penalty):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 50, generator=generator)
    tokens = torch.randint(0, 50, (4, 6), generator=generator)
    theirs = LogitsProcessorList()
    if penalty != 1:
        theirs.append(RepetitionPenaltyLogitsProcessor(penalty))
    theirs.append(TemperatureLogitsWarper(temperature))
    if top_k:
        theirs.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        theirs.append(TopPLogitsWarper(top_p))
    if min_p:
        theirs.append(MinPLogitsWarper(min_p))
    wanted = torch.softmax(theirs(tokens, logits.clone()), -1)
    how = Sampling(temperature, top_k, top_p, min_p, penalty)
    got = probabilities(logits, how, tokens)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


def test_greedy_is_argmax_and_its_distribution_one_hot():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    assert choose(logits, Sampling()).tolist() == [1, 0]
    assert probabilities(logits, Sampling()).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    "how", [Sampling(1.0), Sampling(0.8, top_k=5), Sampling(1.3, top_p=0.7), Sampling(1.0, top_k=6, top_p=0.9)]
)
def test_draws_follow_the_distribution(how):
    """200 000 draws over 8 tokens: a total variation of 0.01 is ten times what chance leaves."""
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    wanted = probabilities(logits, how)[0]
    drawn = choose(logits.expand(200_000, -1), how, generator=torch.Generator().manual_seed(2))
    seen = torch.bincount(drawn, minlength=8) / drawn.numel()
    assert 0.5 * (seen - wanted).abs().sum() < 0.01
    assert not seen[wanted == 0].any()


def test_any_logits_processor_runs_first():
    def forbid_three(tokens, logits):
        return logits.index_fill(1, torch.tensor([3]), float("-inf"))

    logits = torch.zeros(1, 5).index_fill(1, torch.tensor([3]), 9.0)
    how = Sampling(processors=(forbid_three,))
    assert choose(logits, how, torch.zeros(1, 1, dtype=torch.int64)).item() != 3
    with pytest.raises(OptionError, match="needs the tokens so far"):
        choose(logits, how)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.2}, "top_p is 1.2"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        Sampling(**options)


def test_eos_ids():
    assert eos_ids(None) == frozenset()
    assert eos_ids(3) == {3}
    assert eos_ids([3, 5]) == {3, 5}


def test_ties_at_top_k_all_stay_however_many():
    logits = torch.randint(0, 3, (4, 400), generator=torch.Generator().manual_seed(5)).float()  # ~133 of each value
    logits[3] = -torch.inf
    logits[3, 7] = 1.0
    wanted = torch.softmax(TopKLogitsWarper(20)(None, logits), -1)
    torch.testing.assert_close(probabilities(logits, Sampling(1.0, top_k=20)), wanted)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    "how", [Sampling(1.0, top_p=0.9), Sampling(0.7, top_k=40), Sampling(1.2, top_p=0.99, min_p=0.02)]
)
def test_a_wide_vocabulary_needs_no_sort_and_stays_transformers_own(scale, how):
    """20 000 tokens: from a distribution whose nucleus is a few tokens to a flat one, all rows in one batch and apart."""
    generator = torch.Generator().manual_seed(6)
    logits = scale * torch.randn(4, 20_000, generator=generator) + torch.linspace(0, 1e-3, 20_000)
    logits[0] *= 4
    theirs = LogitsProcessorList([TemperatureLogitsWarper(how.temperature)])
    theirs += [TopKLogitsWarper(how.top_k)] if how.top_k else []
    theirs += [TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
    theirs += [MinPLogitsWarper(how.min_p)] if how.min_p else []
    wanted = torch.softmax(theirs(None, logits.clone()), -1)
    got = probabilities(logits, how)
    # the mass is cumulated from opposite ends, so one token may fall on either side of top-p's edge
    assert float(0.5 * (got - wanted).abs().sum(-1).max()) < 2e-4
    for row in range(4):
        torch.testing.assert_close(probabilities(logits[row : row + 1], how)[0], got[row], atol=1e-9, rtol=1e-6)


def _forbid_what_was_said_twice(tokens, logits):
    assert tokens.shape[0] == logits.shape[0] == 1
    return logits.masked_fill(torch.bincount(tokens[0], minlength=logits.shape[1]) > 1, -torch.inf)


@pytest.mark.parametrize(
    "how",
    [
        Sampling(),
        Sampling(0.8, top_k=5),
        Sampling(1.0, top_p=0.8, repetition_penalty=1.4),
        Sampling(repetition_penalty=1.4),
        Sampling(1.0, min_p=0.1, processors=(_forbid_what_was_said_twice,)),
        Sampling(
            1.3, repetition_penalty=0.7, processors=(NoRepeatNGramLogitsProcessor(2), _forbid_what_was_said_twice)
        ),
    ],
)
def test_a_block_is_its_positions_one_by_one(how):
    """Rows of different lengths, with drafts that repeat the row and each other, that end early, and none at all."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(0, 30, (n,), generator=generator).tolist() for n in (1, 9, 4, 23)]
    drafted = torch.randint(0, 30, (4, 5), generator=generator)
    drafted[0, 3:], drafted[2] = -1, -1
    drafted[1, :3] = torch.tensor([rows[1][-1], 29, 29])
    logits = (3 * torch.randn(4, 6, 30, generator=generator)).bfloat16()
    kept = logits.clone()
    got = block_probabilities(logits, how, rows, drafted)
    assert got.dtype == torch.float32
    assert torch.equal(logits, kept)
    torch.testing.assert_close(got.sum(-1), torch.ones(4, 6))
    for b, row in enumerate(rows):
        for i in range(6):
            if i and drafted[b, i - 1] < 0:
                break
            tokens = torch.tensor([row + drafted[b, :i].tolist()])
            wanted = probabilities(logits[b, i : i + 1], how, tokens)[0]
            torch.testing.assert_close(got[b, i], wanted, atol=1e-9, rtol=1e-6)


def test_a_block_of_a_row_without_tokens():
    logits = torch.ones(1, 2, 4)
    got = block_probabilities(logits, Sampling(1.0, repetition_penalty=2.0), [[]], torch.tensor([[1]]))
    assert got[0, 0].tolist() == [0.25] * 4
    assert got[0, 1, 1] < 0.25


PENALTY, WARM, K, P, MIN = (
    RepetitionPenaltyLogitsProcessor(1.2),
    TemperatureLogitsWarper(0.6),
    TopKLogitsWarper(8),
    TopPLogitsWarper(0.9),
    MinPLogitsWarper(0.05),
)


@pytest.mark.parametrize(
    ("theirs", "translated"),
    [
        ([], Sampling(1.0)),
        ([WARM], Sampling(0.6)),
        ([PENALTY, WARM, K, P, MIN], Sampling(0.6, 8, 0.9, 0.05, 1.2)),
        ([NoRepeatNGramLogitsProcessor(2), PENALTY, K], Sampling(1.0, 8, repetition_penalty=1.2, processors=(1,))),
        ([PENALTY, SuppressTokensLogitsProcessor([1, 2]), WARM, P], Sampling(0.6, top_p=0.9, processors=(1, 2))),
        ([WARM, TypicalLogitsWarper(0.9), K], Sampling(1.0, 8, processors=(1, 2))),
        ([WARM, K, TypicalLogitsWarper(0.9)], Sampling(1.0, processors=(1, 2, 3))),
        ([K, WARM, P], Sampling(0.6, top_p=0.9, processors=(1,))),
        ([WARM, WARM], Sampling(0.6, processors=(1,))),
        ([P, K], Sampling(1.0, 8, processors=(1,))),
        ([TopPLogitsWarper(0.5, min_tokens_to_keep=4)], Sampling(1.0, processors=(1,))),
        ([TopKLogitsWarper(3, min_tokens_to_keep=6)], Sampling(1.0, 6)),
        ([TopKLogitsWarper(6, filter_value=-2.0)], Sampling(1.0, processors=(1,))),
        ([MinPLogitsWarper(0.3, min_tokens_to_keep=9)], Sampling(1.0, processors=(1,))),
        ([RepetitionPenaltyLogitsProcessor(1.2, prompt_ignore_length=3)], Sampling(1.0, processors=(1,))),
        ([PENALTY, InfNanRemoveLogitsProcessor(), WARM, LogitNormalization()], Sampling(1.0, processors=(1, 2, 3, 4))),
    ],
)
def test_transformers_list_becomes_numbers_where_that_is_exact(theirs, translated):
    how = sampling_of(LogitsProcessorList(theirs), do_sample=True)
    assert how.processors == tuple(theirs[: len(translated.processors)])
    numbers = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    assert [getattr(how, name) for name in numbers] == [getattr(translated, name) for name in numbers]
    generator = torch.Generator().manual_seed(8)
    logits = 3 * torch.randn(16, 60, generator=generator)
    tokens = torch.randint(0, 60, (16, 12), generator=generator)
    wanted = torch.softmax(LogitsProcessorList(theirs)(tokens, logits.clone()), -1)
    torch.testing.assert_close(probabilities(logits, how, tokens), wanted, atol=1e-6, rtol=1e-5)


def test_transformers_greedy_list_stays_greedy():
    theirs = LogitsProcessorList([SuppressTokensLogitsProcessor([3]), PENALTY])
    how = sampling_of(theirs, do_sample=False)
    assert how.greedy
    assert how.processors == tuple(theirs[:1])
    logits = torch.randn(16, 60, generator=torch.Generator().manual_seed(9))
    logits[:, 3] = 9.0
    tokens = logits.topk(4).indices
    assert torch.equal(choose(logits, how, tokens), theirs(tokens, logits.clone()).argmax(-1))
    warped = sampling_of([PENALTY, WARM], do_sample=False)  # a greedy list has no warpers unless the caller adds them
    assert warped.greedy
    assert len(warped.processors) == 2
