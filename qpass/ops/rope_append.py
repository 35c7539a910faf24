"""``qpass::rope_append``: what stands between q|k|v and attention. Natively ``kernels/cpp/rope.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.ops.linear import LIBRARY

LIBRARY.define(
    "rope_append(Tensor qkv, Tensor? cos, Tensor? sin, Tensor slots, Tensor(a!) keys, Tensor(b!) values) -> Tensor"
)


def heads_of(columns: int, keys: Tensor, values: Tensor) -> int:
    """How many query heads q|k|v of so many columns have; below 1 or in parts where they are no such thing."""
    shared, width = keys.shape[2:]
    return (columns - shared * (width + values.shape[3])) // width


def _rope_append(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotate the queries and keys of ``qkv`` [B, Q, H*D + H_kv*D + H_kv*D_v], write keys and values; the queries [B, H, Q, D].

    ``cos`` and ``sin`` [B or 1, Q, R] rotate the first R columns of each head, halves against each other (RoFormer,
    arXiv 2104.09864, as transformers lays it out); None: nothing is rotated. Token q of row b goes to slot
    ``slots[b, q]`` of ``keys`` [L, B, H_kv, D] and ``values`` [L, B, H_kv, D_v], which have qkv's dtype. Computed in
    fp32, rounded once. A slot outside of the cache is an error.
    """
    batch, _, columns = qkv.shape
    shared, width = keys.shape[2:]
    heads = heads_of(columns, keys, values)
    q, k, v = qkv.split([heads * width, shared * width, shared * values.shape[3]], -1)
    q, k = (_rotated(x.unflatten(-1, (-1, width)), cos, sin) for x in (q, k))
    rows = torch.arange(batch, device=qkv.device)[:, None]
    keys[slots, rows] = k
    values[slots, rows] = v.unflatten(-1, values.shape[2:])
    return q.transpose(1, 2).contiguous()


def _rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """``x`` [B, Q, H, D] with its first R columns rotated."""
    if cos is None or sin is None:
        return x
    turned, rest = x.tensor_split([cos.shape[-1]], -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    left, right = turned.to(wide).chunk(2, -1)
    cos, sin = (t[:, :, None].to(wide) for t in (cos, sin))
    turned = torch.cat([left, right], -1) * cos + torch.cat([-right, left], -1) * sin
    return torch.cat([turned.to(x.dtype), rest], -1)


def _fake(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape[0], heads_of(qkv.shape[2], keys, values), qkv.shape[1], keys.shape[3])


LIBRARY.impl("rope_append", _rope_append, "CompositeExplicitAutograd")
torch.library.register_fake("qpass::rope_append", _fake, lib=LIBRARY)
