"""Attention as the compiled step runs it: SDPA on the key/value heads as they are, under a mask that knows each row.

transformers lets a model's attention and its masks be swapped by name (``config._attn_implementation``). Under
``qpass_sdpa`` the model itself keeps deciding which layers slide, which chunk and where the mask goes; only the two
leaves change:

- the attention call passes ``enable_gqa`` instead of repeating every key and value up to the number of query heads,
  which with a static cache copies the whole cache once a layer;
- the mask accepts one position a batch row, so that rows of a batch may stand at different places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from qpass.errors import UnsupportedError

NAME = "qpass_sdpa"


def attend(
    module: nn.Module,
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,  # [B, H_kv, L, D]
    value: Tensor,  # [B, H_kv, L, D]
    attention_mask: Tensor | None,  # [B, 1, Q, L], bool or additive
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, returned as transformers wants it: ``[B, Q, H, D]`` and no weights."""
    if kwargs.get("s_aux") is not None:
        raise UnsupportedError("its attention has sinks, which scaled dot-product attention doesn't know")
    if attention_mask is None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    softcap = kwargs.get("softcap")
    if softcap is not None or query.shape[2] == 1:
        return _grouped(query, key, value, attention_mask, scaling, softcap).transpose(1, 2).contiguous(), None
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def _grouped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, cap: float | None
) -> Tensor:
    """Attention as two plain products, the queries that share a key head side by side: ``[B, H_kv, H / H_kv * Q, D]``.

    For one query it beats torch's flash attention, whose blocks are made for many (12 heads over 2, D = 128, L = 256:
    0.09 against 0.41 ms on Zen 4). Scores are fp32, squashed by ``cap * tanh(score / cap)`` where a model says so
    (Gemma 2).
    """
    batch, heads, count, width = query.shape
    shared = key.shape[1]
    rows = query.reshape(batch, shared, heads // shared * count, width).float()
    scores = rows @ key.float().transpose(2, 3) * (scaling if scaling is not None else width**-0.5)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.view(batch, heads, count, key.shape[2])
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1).to(value.dtype).view(batch, shared, heads // shared * count, key.shape[2])
    return (weights @ value).view(batch, heads, count, value.shape[3])


def row_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one kind of layer: additive, ``[B, 1, Q, L]``, zero where a query may look and -inf elsewhere.

    ``q_offset`` is the position of each row, ``[B]``; with a scalar (transformers' own caches) this is ``sdpa_mask``.
    ``attention_mask`` is ``[B, L]``, false at padding. A query always sees its own slot: a padded query that sees
    nothing would be NaN, and its NaN value would reach real rows as 0 * NaN.
    """
    if not isinstance(q_offset, Tensor) or q_offset.dim() == 0:
        if mask_function is not None:
            kwargs["mask_function"] = mask_function
        offset: Any = q_offset
        return sdpa_mask(
            batch_size, q_length, kv_length, offset, kv_offset, attention_mask=attention_mask, dtype=dtype, **kwargs
        )
    device = q_offset.device
    row = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.zeros(1, dtype=torch.int64, device=device)[:, None, None, None]
    query = (q_offset[:, None] + torch.arange(q_length, device=device))[:, None, :, None]  # [B, 1, Q, 1]
    slot = (torch.arange(kv_length, device=device) + kv_offset)[None, None, None, :]  # [1, 1, 1, L]
    seen = slot <= query if mask_function is None else mask_function(row, head, query, slot)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :]
    return additive(seen | (slot == query), dtype)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as the number added to the scores; built once a step, where SDPA would convert it once a layer."""
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    mask = torch.where(seen, zero, float("-inf"))
    # Inductor recomputes a cheap pointwise value at each use, so every layer would build the mask again. A strided
    # view needs memory behind it: it makes the mask a buffer once, and costs nothing.
    return mask.as_strided(mask.shape, mask.stride())


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, row_mask)


def serves(model: nn.Module) -> bool:
    """Whether every attention of the model goes through transformers' interface and so can be swapped by name."""
    return bool(getattr(model, "_supports_attention_backend", False))


@contextmanager
def swapped(configs: list[Any]) -> Iterator[None]:
    """Run the block with the attention that these configs name set to ours, and put back what they had."""
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def configs_of(model: nn.Module) -> list[Any]:
    """Every distinct config object that a module of the model reads its attention's name from.

    Empty for a model whose attention can't be swapped: its step builds the whole mask itself.
    """
    if not serves(model):
        return []
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), config)
    return list(found.values())
