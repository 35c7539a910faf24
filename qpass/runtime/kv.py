"""A static KV cache whose position is an argument, and the views of it that a model's forward sees.

The step stays a pure function of its tensors: where a token is written and what it may look at follow from
``position`` alone, so rejecting tokens is moving a position back. What lies behind a position is never read, and
need not be cleared.

Storage is ``[L, B, H_kv, D]``, the token first: its first n tokens are then one contiguous tensor with the same
strides for every n, so one compiled graph attends to as much of the cache as is filled and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from qpass.errors import OptionError
from qpass.ops.attention import SCALE_BYTES, to_int8


@dataclass(frozen=True)
class LayerShape:
    """The heads of one layer: keys ``[L, B, heads, key_dim]``, values ``[L, B, heads, value_dim]``."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


_signatures: dict[tuple[Any, ...], int] = {}


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, ``[L, B, H_kv, D]`` each, allocated once."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def allocate(cls, shapes: Sequence[LayerShape], batch: int, length: int, *, int8: bool = False) -> KVCache:
        """Zeroed storage for ``batch`` rows of ``length`` tokens; ``int8``: as ``ops.attention.to_int8`` stores them."""

        def zeros(s: LayerShape, width: int) -> Tensor:
            if int8:
                return torch.zeros(length, batch, s.heads, width + SCALE_BYTES, dtype=torch.int8)
            return torch.zeros(length, batch, s.heads, width, dtype=s.dtype)

        keys = tuple(zeros(s, s.key_dim) for s in shapes)
        return cls(keys, tuple(zeros(s, s.value_dim) for s in shapes)).first(length)

    @property
    def length(self) -> int:
        """The number of tokens a row can hold."""
        return self.keys[0].shape[0]

    @property
    def batch(self) -> int:
        return self.keys[0].shape[1]

    @cached_property
    def signature(self) -> int:
        """A number for what a compiled graph may depend on, the shape, strides and type of each tensor: equal where they are."""
        said = tuple((t.shape, t.stride(), t.dtype) for t in (*self.keys, *self.values))
        return _signatures.setdefault(said, len(_signatures))

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def first(self, n: int) -> KVCache:
        """The first ``n`` tokens, sharing this cache's memory, their number marked as one that varies."""
        part = KVCache(tuple(t[:n] for t in self.keys), tuple(t[:n] for t in self.values))
        for tensor in (*part.keys, *part.values):
            torch._dynamo.mark_dynamic(tensor, 0)
        return part

    def check_room(self, position: int, tokens: int) -> None:
        """Raise :class:`OptionError` if ``tokens`` more do not fit behind ``position``."""
        if position + tokens > self.length:
            raise OptionError(
                f"the cache is full: it holds {self.length} tokens, {position} are used and {tokens} more were asked for"
            )


def stored(states: Tensor, cache: Tensor) -> Tensor:
    """What a cache tensor keeps of new keys or values; attention reads this, so a prompt may be split anywhere."""
    return to_int8(states) if cache.dtype == torch.int8 else states


class CacheView(Cache):
    """transformers' ``Cache`` over plain tensors, Q tokens of each row behind its position; made anew in every trace."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], position: Tensor, slots: Tensor) -> None:
        # Cache.__init__ is not called: it builds layer objects with lengths of their own, which is what we avoid.
        self.layers = []
        self.layer_class_to_replicate = None
        self.offloading = False
        # Said here, Dynamo knows it: one length for the graph, instead of one a tensor to read, guard and pass each call.
        if any(tensor.shape[0] != keys[0].shape[0] for tensor in (*keys, *values)):
            raise OptionError("the layers of a cache must have one length")
        self.keys, self.values = keys, values
        self.position = position  # [B]
        self.slots = slots  # [B, Q]: where each token is written
        self.rows = torch.arange(slots.shape[0], device=slots.device)[:, None]  # [B, 1]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write ``[B, H_kv, Q, D]`` at the slots and return all of the layer, ``[B, H_kv, L, D]``."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        key_states, value_states = stored(key_states, keys), stored(value_states, values)
        keys[self.slots, self.rows] = key_states.transpose(1, 2)
        values[self.slots, self.rows] = value_states.transpose(1, 2)
        return keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)

    def __len__(self) -> int:
        return len(self.keys)

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:  # type: ignore[override]
        return self.position

    def get_query_offset(self, layer_idx: int = 0) -> Tensor:  # type: ignore[override]
        return self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.keys[layer_idx].shape[0], 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.keys[0].shape[0]

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        # A sliding layer keeps all L tokens too and is masked down to its window: rolled buffers can't roll back.
        return [False] * len(self.keys)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self.keys)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self.keys)


class PromptView(CacheView):
    """The view of a prompt's step: every row starts at slot 0, so its own Q tokens are all there is to look at."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        key_states = stored(key_states, self.keys[layer_idx])
        value_states = stored(value_states, self.values[layer_idx])
        self.keys[layer_idx].copy_(key_states.permute(2, 0, 1, 3))
        self.values[layer_idx].copy_(value_states.permute(2, 0, 1, 3))
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


class ProbeView(PromptView):
    """Stands in for a cache in one forward on fake tensors and notes what each layer would store."""

    def __init__(self, position: Tensor, slots: Tensor) -> None:
        super().__init__((), (), position, slots)
        self.shapes: dict[int, LayerShape] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        heads, key_dim, value_dim = key_states.shape[1], key_states.shape[3], value_states.shape[3]
        self.shapes[layer_idx] = LayerShape(heads, key_dim, value_dim, key_states.dtype)
        return key_states, value_states
