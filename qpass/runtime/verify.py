"""The steps that speculation compiles: the check of K drafted tokens, and the likeliest next token, both as one graph.

    verify(block [B, K+1], position [B], pad [B], keys, values)   -> tokens [B, K+1], count [B]
    likely(input_ids [B, Q], position [B], pad [B], keys, values) -> token [B, 1], probability [B]

``block`` is each row's last token, not yet in the cache, and the drafted ones behind it, -1 where a row has fewer.
``tokens[b, :count[b]]`` are new: the accepted drafts, then the target's own. Rejecting is to go on from an earlier
position: the slots behind it are written again before anything looks at them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qpass.runtime.accept import accept_following
from qpass.runtime.sampling import largest
from qpass.runtime.step import make_step, own_code

Tensors = Sequence[Tensor]
MOST = 16
"""Tokens of a row that one verification checks, at most: K + 1. Its graph is compiled for 2 to this many."""


def make_verify(model: nn.Module) -> Callable[[Tensor, Tensor, Tensor, Tensors, Tensors], tuple[Tensor, Tensor]]:
    """Greedy verification, ready to be compiled with Q dynamic: forward, all logits, acceptance, next tokens."""
    step = make_step(model, last_only=False)

    def verify(block: Tensor, position: Tensor, pad: Tensor, keys: Tensors, values: Tensors) -> tuple[Tensor, Tensor]:
        last = torch.arange(block.shape[1], device=block.device) == block.shape[1] - 1
        following = torch.where(last, -1, block.roll(-1, 1))
        return accept_following(following, step(block.clamp_min(0), position, pad, keys, values))

    return own_code(verify)


def make_likely(model: nn.Module) -> Callable[[Tensor, Tensor, Tensor, Tensors, Tensors], tuple[Tensor, Tensor]]:
    """The step of a greedy draft, ready to be compiled."""
    step = make_step(model, last_only=True)

    def likely(ids: Tensor, position: Tensor, pad: Tensor, keys: Tensors, values: Tensors) -> tuple[Tensor, Tensor]:
        return likeliest(step(ids, position, pad, keys, values))

    return own_code(likely)


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest of logits [B, V], its id [B, 1] and its probability [B]."""
    logits = logits.float()
    token = largest(logits)[:, None]
    return token, torch.exp(logits - logits.amax(-1, keepdim=True)).sum(-1).reciprocal()
