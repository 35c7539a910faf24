"""``qpass::attention``: softmax attention of any queries over a span of cached slots. Natively ``kernels/cpp/attention.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.ops.linear import LIBRARY

LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? k_scales, Tensor? v_scales, Tensor span, float scale,"
    " float softcap=0.0, Tensor? slopes=None, Tensor? sinks=None) -> Tensor"
)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    span: Tensor,
    scale: float,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``q`` [B, H, Q, D] over ``k`` [B, H_kv, L, D] and ``v`` [B, H_kv, L, D_v]; out [B, Q, H, D_v] in q's dtype.

    ``span`` int32 [B, 1, Q, 2]: each query sees slots first <= slot < last, and is zeros where that is empty.
    ``k`` and ``v`` have q's dtype, or are int8 codes with float scales [B, H_kv, L]. A score is ``scale * q . k``,
    then ``softcap * tanh(score / softcap)``, then ``+ slopes[h] * (slot - (last - 1))``; ``sinks`` [H] is the score of
    a slot with no value that every query sees. Keys outside of a span are never looked at, unlike here, where they
    must be finite.
    """
    group = q.shape[1] // k.shape[1]
    key, value = (t.float() for t in (k, v))
    if k_scales is not None:
        key = key * k_scales[..., None]
    if v_scales is not None:
        value = value * v_scales[..., None]
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


def _fake(q, k, v, k_scales, v_scales, span, scale, softcap=0.0, slopes=None, sinks=None):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("qpass::attention", _fake, lib=LIBRARY)
