"""Our warpers against transformers', and draws against the distribution they come from."""

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qpass.errors import OptionError
from qpass.runtime.sampling import BLOCK, Sampling, choose, eos_ids, largest, probabilities


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


@pytest.mark.parametrize("vocabulary", [1, 5, BLOCK, BLOCK + 1, 4 * BLOCK, 5 * BLOCK - 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_is_argmax_with_ties_infinities_and_nan(vocabulary, dtype):
    logits = torch.randint(-3, 4, (50, 2, vocabulary), generator=torch.Generator().manual_seed(4)).to(dtype)
    logits[10:20] = -torch.inf
    logits[20:30, :, -1] = torch.inf
    logits[30:40, :, vocabulary // 2] = torch.nan
    assert torch.equal(largest(logits), logits.argmax(-1))


def test_eos_ids():
    assert eos_ids(None) == frozenset()
    assert eos_ids(3) == {3}
    assert eos_ids([3, 5]) == {3, 5}
