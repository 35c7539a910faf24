"""``qpass::attention``: softmax attention of any queries over a span of cached slots. Natively ``kernels/cpp/attention.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.ops.linear import LIBRARY

LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor span, float scale, float softcap=0.0, Tensor? slopes=None, Tensor? sinks=None) -> Tensor"
)


SCALE_BYTES = 4


def to_int8(x: Tensor) -> Tensor:
    """``x`` [..., D] as symmetric codes with their float32 scale's four bytes behind them: int8 [..., D + 4]."""
    amax = x.float().abs().amax(-1, keepdim=True)
    scale = torch.where(amax > 0, amax / 127.0, 1.0)
    codes = (x.float() / scale).round().clamp(-127, 127).to(torch.int8)
    word = scale.view(torch.int32)
    # By shifts, which compile to one kernel with the rest; a view of another element size would not.
    parts = [((word >> shift) & 0xFF).to(torch.uint8).view(torch.int8) for shift in (0, 8, 16, 24)]
    return torch.cat([codes, *parts], -1)


def from_int8(x: Tensor) -> Tensor:
    """The float32 values [..., D] of what :func:`to_int8` made."""
    return x[..., :-SCALE_BYTES].float() * x[..., -SCALE_BYTES:].contiguous().view(torch.float32)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Tensor,
    scale: float,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``q`` [B, H, Q, D] over ``k`` [B, H_kv, L, D] and ``v`` [B, H_kv, L, D_v]; out [B, Q, H, D_v] in q's dtype.

    ``span`` int32 [B, 1, Q, 2]: each query sees slots first <= slot < last, and is zeros where that is empty.
    ``k`` and ``v`` have q's dtype, or are what :func:`to_int8` makes. A score is ``scale * q . k``,
    then ``softcap * tanh(score / softcap)``, then ``+ slopes[h] * (slot - (last - 1))``; ``sinks`` [H] is the score of
    a slot with no value that every query sees. Keys outside of a span are never looked at, unlike here, where they
    must be finite.
    """
    group = q.shape[1] // k.shape[1]
    key, value = (from_int8(t) if t.dtype == torch.int8 else t.float() for t in (k, v))
    scores = q.float() @ key.repeat_interleave(group, 1).transpose(2, 3) * scale  # [B, H, Q, L]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    slot = torch.arange(k.shape[2], device=q.device)
    first, last = span[..., :1], span[..., 1:]  # [B, 1, Q, 1]
    if slopes is not None:
        scores = scores + slopes[:, None, None] * (slot - (last - 1))
    scores = scores.masked_fill((slot < first) | (slot >= last), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1).masked_fill(first >= last, 0.0)[..., : k.shape[2]]
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous().to(q.dtype)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Tensor,
    scale: float,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    width = v.shape[3] - (SCALE_BYTES if v.dtype == torch.int8 else 0)
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], width)


LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("qpass::attention", _fake, lib=LIBRARY)
