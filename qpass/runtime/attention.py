"""Attention as the compiled step runs it: ``qpass::attention`` on the key/value heads as they are, over spans of slots.

transformers lets a model's attention and its masks be swapped by name (``config._attn_implementation``). Under
``qpass_span`` the model itself keeps deciding which layers slide, which chunk and where the mask goes; only the two
leaves change:

- the mask of a kind of layer is not a matrix but two numbers a query, the first slot it sees and the one behind the
  last: causal, sliding, chunked and left-padded attention all see an interval;
- the attention call reads those slots alone, whatever the cache's length, each key and value once for all the query
  heads that share it.

Under transformers' own caches, whose masks are matrices, both leaves are transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import qpass.ops  # noqa: F401  registers the op
from qpass.errors import KernelError, UnsupportedError
from qpass.kernels import attention_unit

NAME = "qpass_span"


def attend(
    module: nn.Module,
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,  # [B, H_kv, L, D]
    value: Tensor,  # [B, H_kv, L, D]
    attention_mask: Tensor | None,  # a span, int32 [B, 1, Q, 2], or a mask [B, 1, Q, L], bool or additive
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, returned as transformers wants it: ``[B, Q, H, D]`` and no weights."""
    sinks, softcap = kwargs.get("s_aux"), kwargs.get("softcap")
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        if kwargs.get("position_bias") is not None:
            raise UnsupportedError("its attention adds a position bias, which attention over spans doesn't know")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        sinks = None if sinks is None else sinks.float()
        return torch.ops.qpass.attention(query, key, value, attention_mask, scale, softcap or 0.0, None, sinks), None
    if sinks is not None or softcap is not None:
        raise UnsupportedError("its attention has sinks or a softcap, which scaled dot-product attention doesn't know")
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def row_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Tensor | None:
    """What each query of one kind of layer sees, int32 ``[B, 1, Q, 2]``: first <= slot < last; a matrix for a
    model with a mask of its own making.

    ``q_offset`` is the position of each row, ``[B]``; with a scalar (transformers' own caches) this is ``sdpa_mask``.
    ``attention_mask`` is ``[B, L]``, false at the padding, which is on the left. A query always sees its own slot: a
    padded query that sees nothing would be NaN in SDPA, and its NaN value would reach real rows as 0 * NaN.
    """
    if not isinstance(q_offset, Tensor) or q_offset.dim() == 0:
        offset: Any = q_offset
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            offset,
            kv_offset,
            mask_function,
            attention_mask,
            local_size,
            dtype=dtype,
            **kwargs,
        )
    device = q_offset.device
    query = q_offset[:, None] + torch.arange(q_length, device=device)  # [B, Q]
    first = torch.zeros_like(query) if attention_mask is None else (~attention_mask).sum(1)[:, None]
    if mask_function is not causal_mask_function:
        row = torch.arange(batch_size, device=device)[:, None, None, None]
        head = torch.zeros(1, dtype=torch.int64, device=device)[:, None, None, None]
        slot = (torch.arange(kv_length, device=device) + kv_offset)[None, None, None, :]
        seen = mask_function(row, head, query[:, None, :, None], slot)  # [B, 1, Q, L]
        if local_size is None or kwargs.get("use_vmap"):  # a mask of the model's own: maybe no interval
            real = True if attention_mask is None else attention_mask[:, None, None, :]
            return additive((seen & real) | (slot == query[:, None, :, None]), dtype)
        # A window or a chunk: what it sees ends with its own slot, so the number of slots says all.
        first = torch.maximum(first, query + 1 - seen.sum(3)[:, 0])
    span = torch.stack([torch.minimum(first, query), query + 1], -1)  # [B, Q, 2]
    return _in_memory(span[:, None].to(torch.int32))


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as the number added to the scores; built once a step, where SDPA would convert it once a layer."""
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return _in_memory(torch.where(seen, zero, float("-inf")))


def _in_memory(mask: Tensor) -> Tensor:
    """The same tensor, computed once a step.

    Inductor recomputes a cheap pointwise value at each use, so every layer would build the mask again. A strided view
    needs memory behind it: it makes the mask a buffer once, and costs nothing.
    """
    return mask.as_strided(mask.shape, mask.stride())


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, row_mask)


def keep_tables(model: nn.Module) -> None:
    """Have the cosines and sines of rotary embeddings computed once a step, not in every layer for every head."""
    for module in model.modules():
        if hasattr(module, "inv_freq") and not hasattr(module, "_qpass_keeps_tables"):
            module.register_forward_hook(_table_in_memory)
            object.__setattr__(module, "_qpass_keeps_tables", True)


def _table_in_memory(module: nn.Module, args: Any, out: Any) -> Any:
    pair = isinstance(out, tuple) and all(isinstance(t, Tensor) for t in out)
    return tuple(_in_memory(t) for t in out) if pair else out


def prepare() -> str | None:
    """Load the native attention; the reason in a sentence where this machine can't have it and plain torch serves."""
    try:
        attention_unit.ensure()
    except KernelError as error:
        return str(error)
    return None


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
