"""The acceptance rules: exact in distribution, ragged, and in range whatever comes in.

The gate: 10^6 rounds a case, drafts and target both depending on the token before. Every position's tokens, given the
token before it, must pass a chi-square test at a significance of 1e-6 a case (seeds are fixed, so a pass stays one), and
the joint of the first two tokens must lie as near to the product of the target's distributions as 10^6 direct draws do,
by a bound that direct sampling passes with probability 1 - 1e-6. A rule that is wrong must not pass it.
"""

import math

import pytest
import torch

from qpass.runtime import accept
from qpass.runtime.accept import accept_greedy, accept_sampled

ROUNDS, VOCABULARY, ALPHA = 1_000_000, 5, 1e-6


def tables(kind: str, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """p [K+1, V, V] and q [K, V, V] (position, token before, token); q None: the draft is chosen, not drawn."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(1.5 * torch.randn(k + 1, VOCABULARY, VOCABULARY, generator=generator), -1)
    q = torch.softmax(1.5 * torch.randn(k, VOCABULARY, VOCABULARY, generator=generator), -1)
    if kind == "disjoint":  # the draft only proposes what the target never says
        mine = torch.arange(VOCABULARY) < 2
        p, q = p * ~mine, q * mine
    elif kind == "overlapping":  # supports that share a token or two, and exact zeros on both sides
        p, q = p * (torch.arange(VOCABULARY) < 3), q * (torch.arange(VOCABULARY) > 1)
    elif kind == "equal":
        q = p[:k].clone()
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    return p, None if kind == "chosen" else q


def direct(table: torch.Tensor, before: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Tokens [N] drawn from the rows [V] of ``table`` that follow the tokens ``before`` [N]."""
    reached = table.double().cumsum(-1)
    return (reached / reached[:, -1:])[before].le(chance[:, None]).sum(-1)


def one_round(kind: str, k: int, rule=accept_sampled) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """p's tables, the drafts [N, K], the tokens [N, K+1] and their count [N] of N independent rounds."""
    generator = torch.Generator().manual_seed(100 + k)
    p, q = tables(kind, k, seed=k)
    drafted = torch.zeros(ROUNDS, k, dtype=torch.int64)
    before = torch.zeros(ROUNDS, dtype=torch.int64)
    seen = [before]
    for i in range(k):
        if q is None:
            before = (before * 2 + i + 1) % VOCABULARY  # any rule that is no draw
        else:
            chance = torch.rand(ROUNDS, generator=generator, dtype=torch.float64)
            before = direct(q[i], before, chance)
        drafted[:, i] = before
        seen.append(before)
    full_p = torch.stack([p[i][seen[i]] for i in range(k + 1)], 1)
    full_q = None if q is None else torch.stack([q[i][seen[i]] for i in range(k)], 1)
    if kind == "ragged":  # each row ends after 0..K drafts; behind that, what a draft leaves there may be anything
        lengths = torch.randint(0, k + 1, (ROUNDS, 1), generator=generator)
        gone = torch.arange(k) >= lengths
        drafted = drafted.masked_fill(gone, -1)
        full_p[:, 1:] = torch.where(gone[..., None], p[1:, 1, :].flip(-1), full_p[:, 1:])
    uniform = torch.rand(ROUNDS, k + 1, generator=generator, dtype=torch.float64)
    tokens, count = rule(drafted, full_p, full_q, uniform)
    return p, drafted, tokens, count


def p_value(statistic: float, freedom: int) -> float:
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))


def gate(p: torch.Tensor, tokens: torch.Tensor, count: torch.Tensor) -> list[str]:
    """What is wrong with the tokens of many rounds; nothing for an exact rule."""
    faults = []
    statistic, freedom = 0.0, 0
    before = torch.zeros(len(tokens), dtype=torch.int64)
    for i in range(tokens.shape[1]):
        here = count > i
        cells = VOCABULARY * before[here] + tokens[here, i].clamp(0, VOCABULARY - 1)
        seen = torch.bincount(cells, minlength=VOCABULARY**2).reshape(VOCABULARY, VOCABULARY).double()
        wanted = p[i].double() / p[i].double().sum(-1, keepdim=True) * seen.sum(-1, keepdim=True)
        if seen[wanted == 0].any():
            faults.append(f"position {i}: a token of probability 0")
        used = wanted > 0
        statistic += float(((seen - wanted)[used] ** 2 / wanted[used]).sum())
        freedom += int((used.sum(-1) - 1).clamp_min(0).sum())
        before = torch.where(here, tokens[:, i].clamp(0, VOCABULARY - 1), before)
    if p_value(statistic, freedom) < ALPHA:
        faults.append(f"chi-square {statistic:.0f} with {freedom} degrees of freedom")
    # the joint of two tokens: a round that ended after one goes on with a direct draw, as the next round would
    chance = torch.rand(len(tokens), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    first = tokens[:, 0].clamp(0, VOCABULARY - 1)
    second = torch.where(count > 1, tokens[:, 1], direct(p[1], first, chance)).clamp(0, VOCABULARY - 1)
    joint = torch.bincount(VOCABULARY * first + second, minlength=VOCABULARY**2).double() / len(tokens)
    wanted = (p[0, 0][:, None] * p[1]).double().flatten()
    variation = 0.5 * float((joint - wanted).abs().sum())
    # E[TV] <= sqrt(cells / N) / 2 for N direct draws, and P(TV > E + t) <= exp(-2 N t^2) (McDiarmid)
    bound = 0.5 * math.sqrt(VOCABULARY**2 / ROUNDS) + math.sqrt(-math.log(ALPHA) / (2 * ROUNDS))
    if variation > bound:
        faults.append(f"total variation {variation:.4f}, bound {bound:.4f}")
    return faults


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("kind", ["generic", "disjoint", "overlapping", "chosen", "equal", "ragged"])
def test_what_comes_out_is_distributed_as_the_target(kind, k):
    p, drafted, tokens, count = one_round(kind, k)
    assert tokens.shape == (ROUNDS, k + 1)
    assert int(count.min()) >= 1
    assert gate(p, tokens, count) == []
    if kind == "equal":
        assert bool((count == k + 1).all())
    if kind == "disjoint":
        assert bool((count == 1).all())
    if kind == "ragged":
        assert bool((count <= (drafted >= 0).sum(1) + 1).all())


def _residual_is_p(weights, otherwise, uniform, draw=accept._draw):
    return draw(otherwise, otherwise, uniform)


def _lenient(drafted, p, q, uniform):
    return accept_sampled(drafted, p, q, torch.cat([0.97 * uniform[:, :-1], uniform[:, -1:]], 1))


@pytest.mark.parametrize("kind", ["generic", "chosen"])
def test_the_gate_fails_a_residual_that_is_p(kind, monkeypatch):
    monkeypatch.setattr(accept, "_draw", _residual_is_p)
    p, _, tokens, count = one_round(kind, 2)
    assert any("chi-square" in fault for fault in gate(p, tokens, count))
    assert any("variation" in fault for fault in gate(p, tokens, count))


def test_the_gate_fails_a_rule_that_keeps_three_percent_too_much():
    p, _, tokens, count = one_round("generic", 2, rule=_lenient)
    assert any("chi-square" in fault for fault in gate(p, tokens, count))


def test_greedy_keeps_what_is_the_argmax_and_adds_one():
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 1, 2], [3, 1, 2], [3, 1, 2], [3, 1, 2]]), 5).float()
    drafted = torch.tensor([[3, 1], [3, 2], [0, 1], [-1, -1]])
    tokens, count = accept_greedy(drafted, logits)
    assert count.tolist() == [3, 2, 1, 1]
    rows = zip(tokens.tolist(), count.tolist(), strict=True)
    assert [row[:n] for row, n in rows] == [[3, 1, 2], [3, 1], [3], [3]]


def test_greedy_and_sampled_agree_where_the_target_is_certain():
    generator = torch.Generator().manual_seed(3)
    best = torch.randint(0, 7, (64, 5), generator=generator)
    drafted = torch.where(torch.rand(64, 4, generator=generator) < 0.7, best[:, :-1], 6 - best[:, :-1])
    drafted[::3, 2:] = -1
    p = torch.nn.functional.one_hot(best, 7).float()
    uniform = torch.rand(64, 5, generator=generator, dtype=torch.float64)
    by_argmax, count = accept_greedy(drafted, p)
    by_chance, same = accept_sampled(drafted, p, None, uniform)
    assert torch.equal(count, same)
    real = torch.arange(5) < count[:, None]
    assert torch.equal(by_argmax[real], by_chance[real])


@pytest.mark.parametrize("k", [0, 3])
def test_no_drafts_at_all_is_plain_sampling(k):
    p = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).expand(4, k + 1, 4)
    uniform = torch.tensor([0.0, 0.49, 0.5, 0.76])[:, None].expand(4, k + 1)
    tokens, count = accept_sampled(torch.full((4, k), -1), p, None, uniform)
    assert count.tolist() == [1, 1, 1, 1]
    assert tokens[:, 0].tolist() == [0, 0, 2, 3]


def test_a_wide_vocabulary_is_drawn_from_as_a_narrow_one():
    """Over several blocks of the search, the last one short: 10^5 draws from 300 tokens, a third of them impossible."""
    draws = 100_000
    p = torch.softmax(torch.randn(300, generator=torch.Generator().manual_seed(5)), -1)
    p[torch.arange(300) % 3 == 1] = 0
    p /= p.sum()
    uniform = torch.rand(draws, 1, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    none = torch.empty(draws, 0, dtype=torch.int64)
    tokens, _ = accept_sampled(none, p.expand(draws, 1, 300), None, uniform)
    seen = torch.bincount(tokens[:, 0], minlength=300)
    assert not seen[p == 0].any()
    wanted = draws * p[p > 0].double()
    assert p_value(float(((seen[p > 0] - wanted) ** 2 / wanted).sum()), 199) > ALPHA


@pytest.mark.parametrize("last", [1 - 2**-53, 1.0])
def test_the_greatest_uniform_gives_a_token_of_positive_probability(last):
    p = torch.tensor([[[0.3, 0.7, 0.0, 0.0]]])
    tokens, _ = accept_sampled(torch.empty(1, 0, dtype=torch.int64), p, None, torch.full((1, 1), last).double())
    assert tokens.tolist() == [[1]]


def test_a_residual_that_rounds_to_nothing_is_p():
    """p and q equal and the draft refused (only a foreign uniform does that): p decides."""
    p = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]])
    tokens, count = accept_sampled(torch.tensor([[0]]), p, p[:, :1], torch.tensor([[1.0, 0.9]]))
    assert count.tolist() == [1]
    assert tokens[0, 0] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0])
@pytest.mark.parametrize("chosen", [True, False])
def test_degenerate_distributions_stay_in_the_vocabulary(bad, chosen):
    p, q = torch.full((3, 3, 4), bad), None if chosen else torch.full((3, 2, 4), bad)
    drafted = torch.tensor([[1, 2], [3, -1], [4, 9]])
    uniform = torch.tensor([[0.0, 0.5, 0.999]]).expand(3, 3)
    for tokens, count in (accept_sampled(drafted, p, q, uniform), accept_greedy(drafted, p)):
        assert int(count.min()) >= 1
        assert int(count.max()) <= 3
        new = tokens[torch.arange(3) < count[:, None]]
        assert int(new.min()) >= 0
        assert int(new.max()) < 4


@pytest.mark.parametrize("chosen", [True, False])
def test_it_is_one_graph(chosen):
    p, drafted = torch.softmax(torch.randn(2, 4, 11), -1), torch.tensor([[1, 2, 3], [4, -1, -1]])
    q = None if chosen else torch.softmax(torch.randn(2, 3, 11), -1)
    uniform = torch.rand(2, 4, dtype=torch.float64)
    sampled = torch.compile(accept_sampled, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(sampled(drafted, p, q, uniform), accept_sampled(drafted, p, q, uniform), strict=True):
        assert torch.equal(got, wanted)
    greedy = torch.compile(accept_greedy, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(greedy(drafted, p), accept_greedy(drafted, p), strict=True):
        assert torch.equal(got, wanted)
