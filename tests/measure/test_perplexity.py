"""Perplexity and divergence against loops that a reader can check, and against transformers' own loss."""

import functools
import math

import pytest
import torch
import transformers as tf

from qpass.errors import OptionError
from qpass.measure.divergence import Divergence, divergence
from qpass.measure.perplexity import Perplexity, perplexity, scored, windows

VOCABULARY = 53


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return tf.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, VOCABULARY, (101,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("total", "length", "stride"), [(101, 16, 5), (101, 16, 15), (100, 20, 10), (16, 16, 3), (7, 16, 3), (17, 16, 15)]
)
def test_each_token_is_scored_once_with_enough_context(total, length, stride):
    width, places = windows(total, length, stride)
    seen = [j for w in places for j in range(w.first, w.begin + width)]
    assert seen == list(range(1, total))
    for w in places[1:]:
        assert w.first - w.begin >= length - stride
        assert 0 <= w.begin <= total - width


@pytest.mark.parametrize("batch", [1, 4])
def test_it_is_the_plain_loop(model, ids, batch):
    length, stride = 16, 5
    total, begin, seen = 0.0, 0, 1
    while seen < len(ids):  # token by token, each with the context that its window gives it
        end = min(begin + length, len(ids))
        start = max(0, end - length)
        for j in range(seen, end):
            logits = model(ids[None, start:j]).logits[0, -1].double()
            total -= logits.log_softmax(-1)[ids[j]].item()
        seen, begin = end, begin + stride
    (record,) = perplexity(model, ids, length=length, stride=stride, batch=batch)
    assert record.value == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-5)
    assert record.n == len(ids) - 1
    assert record.p10 < record.value < record.p90


def test_one_window_is_transformers_own_loss(model, ids):
    loss = model(ids[None], labels=ids[None]).loss.item()
    (record,) = perplexity(model, ids, length=512, stride=256)
    assert record.value == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_model_of_equal_chances_has_its_vocabulary_as_perplexity(ids):
    (record,) = perplexity(lambda x: torch.zeros(*x.shape, VOCABULARY), ids, length=16, stride=8)
    assert record.value == pytest.approx(VOCABULARY, rel=1e-6)
    assert record.p90 - record.p10 < 1e-4


def test_a_compiled_model_would_see_one_shape(ids):
    shapes = set()

    def uniform(x):
        shapes.add(tuple(x.shape))
        return torch.zeros(*x.shape, VOCABULARY)

    list(scored(uniform, ids, length=16, stride=6, batch=4))
    assert shapes == {(4, 16)}


def _surprised(ease, x):
    """Logits of three tokens, of which the first has the log-likelihood -ease."""
    right = next(ease)
    logits = ((1 - (-right).exp()) / 2).log().repeat(1, x.shape[1], 3)
    logits[..., 0] = -right
    return logits


def test_the_interval_covers_the_truth_four_times_in_five():
    """Windows of unequal difficulty, true mean known: the 80% interval must hold it about 80% of the time."""
    generator = torch.Generator().manual_seed(2)
    held = 0
    for _ in range(400):
        ease = iter(torch.rand(20, generator=generator))  # the likelihood's log is uniform in 0..1, mean 0.5
        model = functools.partial(_surprised, ease)
        (record,) = perplexity(model, torch.zeros(20 * 8 + 1, dtype=torch.int64), length=9, stride=8)
        held += record.p10 <= math.exp(0.5) <= record.p90
    assert 0.72 < held / 400 < 0.86


def test_divergence_is_the_definition(model, ids):
    other = lambda x: model(x).logits * 0.7  # noqa: E731
    kl, p99, top1 = divergence(model, other, ids, length=16, stride=5, batch=3)
    wanted = []
    for (ours, _), (theirs, _) in zip(
        scored(model, ids, length=16, stride=5), scored(other, ids, length=16, stride=5), strict=True
    ):
        for a, b in zip(ours, theirs, strict=True):
            p, q = torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
            wanted.append(torch.distributions.kl_divergence(p, q).item())
    assert kl.value == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)
    assert p99.value == pytest.approx(torch.tensor(wanted).quantile(0.99).item(), rel=1e-3)
    assert p99.p10 <= p99.value <= p99.p90
    assert (top1.value, top1.n) == (1.0, 100)  # scaling keeps the order
    assert kl.p10 < kl.value < kl.p90


def test_divergence_is_not_symmetric_and_counts_other_choices():
    p, q = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).log(), torch.tensor([[0.4, 0.6], [0.2, 0.8]]).log()
    found = Divergence()
    found.add(p, q)
    kl, _, top1 = found.records()
    wanted = 0.8 * math.log(2) + 0.2 * math.log(1 / 3) + 0.3 * math.log(1.5) + 0.7 * math.log(0.7 / 0.8)
    assert kl.value == pytest.approx(wanted / 2, rel=1e-5)
    assert top1.value == 0.5


def test_the_same_model_diverges_by_nothing(model, ids):
    kl, p99, top1 = divergence(model, model, ids, length=32, stride=16)
    assert (kl.value, p99.value, top1.value) == (0, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 16, "stride": 16}, "stride is 16; accepted: 1 to 15"),
        ({"length": 16, "stride": 0}, "stride is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"ids": torch.tensor([3])}, "the text has 1 tokens"),
    ],
)
def test_what_is_wrong_is_named(model, ids, arguments, message):
    with pytest.raises(OptionError, match=message):
        perplexity(model, **{"ids": ids, **arguments})


def test_other_vocabularies_are_refused(ids):
    with pytest.raises(OptionError, match="one vocabulary"):
        divergence(lambda x: torch.zeros(*x.shape, 5), lambda x: torch.zeros(*x.shape, 6), ids)


def test_logits_are_no_log_probabilities():
    with pytest.raises(ValueError, match="these are logits"):
        Perplexity().add(torch.randn(3, 9) + 5, torch.tensor([0, 1, 2]))
