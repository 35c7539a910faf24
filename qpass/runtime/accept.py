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

import torch
from torch import Tensor


def accept_greedy(drafted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of a round and how many of them count, under argmax decoding.

    ``drafted`` int64 [B, K], -1 from where on a row proposes nothing; ``logits`` [B, K+1, V], position i having seen
    the row's real tokens and its first i drafts. Returns tokens int64 [B, K+1] and count int64 [B] in 1..K+1: a row's
    new tokens are its first ``count``; what lies behind is unspecified.
    """
    best = logits.argmax(-1)  # [B, K+1]
    return best, _leading(
        drafted == best[:, :-1]
    ) + 1  # where a draft stays it is the argmax; where not, that replaces it


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
    own = p[row, kept].double()  # [B, V], the distribution at the first position without a kept draft
    residual = own
    if width:
        at = kept.clamp_max(width - 1)
        refused = ((kept < width) & real[row, at])[:, None]  # [B, 1]: a draft stood here, so p has q taken away
        if q is None:
            residual = torch.where(
                refused & (torch.arange(vocabulary, device=p.device) == index[row, at][:, None]), 0.0, own
            )
        else:
            residual = torch.where(refused, own - q[row, at].double(), own)
    final = _draw(_weights(residual), _weights(own), uniform[:, -1].double())  # [B]

    tokens = torch.cat([drafted, final[:, None]], 1)
    return tokens.scatter(1, kept[:, None], final[:, None]), kept + 1


def _leading(stays: Tensor) -> Tensor:
    """How many of each row's first entries are true, int64 [B]; ``stays`` bool [B, K]."""
    return stays.to(torch.int64).cumprod(1).sum(1)


def _weights(difference: Tensor) -> Tensor:
    """What is positive and finite, [B, V]; the rest, NaN included, is 0."""
    return torch.where((difference > 0) & torch.isfinite(difference), difference, 0.0)


def _draw(weights: Tensor, otherwise: Tensor, uniform: Tensor) -> Tensor:
    """One token a row, int64 [B], by the inverse of the cumulated weights, fp64 [B, V], normalized or not.

    A row whose weights are all 0 (p = q but for rounding) draws from ``otherwise``.
    """
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, otherwise)
    reached = weights.cumsum(-1)  # [B, V]
    total = reached[:, -1:].contiguous()
    drawn = torch.searchsorted(
        reached, uniform[:, None] * total, right=True
    )  # the first that lies above: its weight is > 0
    last = torch.searchsorted(
        reached, total
    )  # the last of positive weight, for a product that was rounded up to the total
    return torch.minimum(drawn, last).squeeze(-1)
