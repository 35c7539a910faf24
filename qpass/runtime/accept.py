"""Which drafted tokens a row keeps, and the token that the target adds: pure tensor functions, exact in distribution.

Greedy: a drafted token stays while it is the target's own argmax. Sampled: speculative sampling of Leviathan et al.
(arXiv 2211.17192, Algorithm 1) and Chen et al. (arXiv 2302.01318, Algorithm 2): token x, drawn from q, stays with
probability min(1, p(x) / q(x)); the first that doesn't is replaced by a draw from max(0, p - q), normalized; behind the
last, one more is drawn from p. What comes out is distributed as p, whatever q is. A token that was chosen and not drawn
(greedy, n-gram) has a one-hot q: it stays with probability p(x), and the residual is p without x.

Shapes: B rows, K drafted tokens, V vocabulary. Rows are independent of each other; nothing here reads a value back to
Python, so it traces into the verification graph.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qpass.runtime.search import BLOCK, block_at, in_blocks, largest


def accept_greedy(drafted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of a round and how many of them count, under argmax decoding.

    ``drafted`` int64 [B, K], -1 from where on a row proposes nothing; ``logits`` [B, K+1, V], position i having seen
    the row's real tokens and its first i drafts. Returns tokens int64 [B, K+1] and count int64 [B] in 1..K+1: a row's
    new tokens are its first ``count``; what lies behind is unspecified.
    """
    return accept_following(torch.nn.functional.pad(drafted, (0, 1), value=-1), logits)


def accept_following(following: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`accept_greedy` with the drafts as wide as the logits: ``following`` [B, K+1] is what each position was
    guessed to be followed by, its last column -1. No size here is K, which a graph for a varying K could not compare with 1.
    """
    best = largest(logits)  # [B, K+1]: where a draft stays it is this; where not, this replaces it
    return best, _leading(following == best) + 1


def accept_sampled(drafted: Tensor, p: Tensor, q: Tensor | None, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The same for sampling: what comes out is distributed as if each token were drawn from ``p``.

    ``p`` fp32 [B, K+1, V], the target's distribution at each position; ``q`` fp32 [B, K, V], the one that each draft
    was drawn from, None where drafts were chosen (one-hot); ``uniform`` [B, K+1] in [0, 1): one number a draft, the
    last for the target's own token. Give it in float64: in float32 it has 2^24 values, too few for rare tokens.
    A draft of -1, or out of the vocabulary, is never kept and leaves p itself to draw from.
    A distribution of NaN or of zeros gives some token of the vocabulary, never one beyond it.
    """
    width, vocabulary = drafted.shape[1], p.shape[-1]
    real = (drafted >= 0) & (drafted < vocabulary)  # [B, K]
    index = torch.where(real, drafted, 0)
    p_x = p[:, :-1].gather(-1, index[..., None]).squeeze(-1).double()  # [B, K]
    q_x = torch.ones_like(p_x) if q is None else q.gather(-1, index[..., None]).squeeze(-1).double()
    stays = real & (uniform[:, :-1].double() * q_x < p_x)  # u < p / q; in float64 true for every u where p = q > 0
    kept = _leading(stays)  # [B]

    row = torch.arange(drafted.shape[0], device=drafted.device)
    own = p[row, kept]  # [B, V], the distribution at the first position without a kept draft
    residual = own
    if width:
        at = kept.clamp_max(width - 1)
        refused = ((kept < width) & real[row, at])[:, None]  # [B, 1]: a draft stood here, so p has q taken away
        if q is None:
            x = index[row, at][:, None]
            residual = own.scatter(1, x, torch.where(refused, 0.0, own.gather(1, x)))
        else:
            residual = torch.where(refused, own - q[row, at], own).clamp_min(0)
    final = _draw(residual, own, uniform[:, -1].double())  # [B]

    tokens = torch.cat([drafted, final[:, None]], 1)
    return tokens.scatter(1, kept[:, None], final[:, None]), kept + 1


def _leading(stays: Tensor) -> Tensor:
    """How many of each row's first entries are true, int64 [B]; ``stays`` bool [B, K]."""
    return stays.to(torch.int64).cumprod(1).sum(1)


def _draw(weights: Tensor, otherwise: Tensor, uniform: Tensor) -> Tensor:
    """One token a row, int64 [B], by inverting the cumulated weights [B, V], normalized or not, in float64.

    A row whose weights are all 0 (p = q but for rounding) draws from ``otherwise``. First a block of the vocabulary is
    found, then the token in it. Every search ends at the last place of positive weight, so that neither a uniform next
    to 1 nor a product rounded up leaves the support; blocks with NaN or infinity weigh nothing.
    """
    sums, others = (in_blocks(w, partial(torch.sum, dtype=torch.float64)) for w in (weights, otherwise))  # [B, N]
    empty = ~(_finite(sums).sum(-1, keepdim=True) > 0)
    block, rest = _invert(torch.where(empty, others, sums), uniform)
    inside = torch.where(empty, block_at(otherwise, block, 0.0), block_at(weights, block, 0.0))  # [B, BLOCK]
    token, _ = _invert(inside.double(), rest)
    return (block * BLOCK + token).clamp_max(weights.shape[-1] - 1)


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The index [B] where the cumulated fp64 weights [B, N] pass ``uniform`` [B] of their sum, and how far into it, 0..1."""
    weights = _finite(weights)
    reached = weights.cumsum(-1)
    total = reached[:, -1:].contiguous()
    target = uniform[:, None] * total
    drawn = torch.searchsorted(reached, target, right=True)  # the first that lies above, so its weight is positive
    index = torch.minimum(drawn, torch.searchsorted(reached, total))  # and the last of positive weight
    own = weights.gather(-1, index)
    inside = (target - (reached.gather(-1, index) - own)) / own
    return index.squeeze(-1), torch.nan_to_num(inside, nan=0.0).clamp(0, 1).squeeze(-1)


def _finite(weights: Tensor) -> Tensor:
    return torch.where((weights > 0) & (weights < torch.inf), weights, 0.0)
