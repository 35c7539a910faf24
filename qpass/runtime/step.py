"""One forward of a causal language model as a pure function of tensors.

    prompt(input_ids [B, Q], count [B], keys, values)            -> logits of token count - 1 of each row [B, V]
    step(input_ids [B, Q], position [B], pad [B], keys, values)  -> logits [B, V] of the last token, or [B, Q, V]

Slots are absolute: token q of row b is written to slot ``position[b] + q``; slots below ``pad[b]`` are padding. The
position that a rotary or learned embedding sees is ``slot - pad``. Keys and values, ``[n, B, H_kv, D]`` a layer, are
updated in place; n covers every slot that is written or looked at, and is Q for a prompt, which starts at slot 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qpass.errors import QpassError, UnsupportedError
from qpass.runtime import attention
from qpass.runtime.kv import CacheView, LayerShape, ProbeView, PromptView

Tensors = Sequence[Tensor]


def make_prompt(model: nn.Module) -> Callable[[Tensor, Tensor, Tensors, Tensors], Tensor]:
    """The step of a whole prompt, ready to be compiled with Q dynamic. The head runs on each row's last token only.

    Row b has ``count[b]`` tokens, and anything behind them: what is written there is written again before it is read.
    Rows padded in front would stand in other slots than alone, and their sums in other blocks of attention.
    """
    run = _forward(model, last_only=True)

    def prompt(input_ids: Tensor, count: Tensor, keys: Tensors, values: Tensors) -> Tensor:
        position = torch.zeros_like(count)
        slots = _slots(position, input_ids)
        view = PromptView(keys, values, position, slots)
        return run(input_ids, slots, position, view, input_ids.shape[1], count - 1)

    return own_code(prompt)


def make_step(model: nn.Module, *, last_only: bool) -> Callable[[Tensor, Tensor, Tensor, Tensors, Tensors], Tensor]:
    """The step of Q tokens at any positions, ready to be compiled. Decoding wants ``last_only``; verification all."""
    run = _forward(model, last_only=last_only)

    def step(input_ids: Tensor, position: Tensor, pad: Tensor, keys: Tensors, values: Tensors) -> Tensor:
        slots = _slots(position, input_ids)
        return run(input_ids, slots, pad, CacheView(keys, values, position, slots), keys[0].shape[0])

    return own_code(step)


def _slots(position: Tensor, input_ids: Tensor) -> Tensor:
    return position[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)  # [B, Q]


def _forward(model: Any, *, last_only: bool) -> Callable[..., Tensor]:
    accepted = inspect.signature(model.forward).parameters
    takes_positions, keeps = "position_ids" in accepted, "logits_to_keep" in accepted
    cache_name = "cache" if "cache" in accepted else "past_key_values"  # until transformers 5.23
    swappable, dtype = attention.serves(model), model.dtype

    def run(
        input_ids: Tensor, slots: Tensor, pad: Tensor, cache: CacheView, n: int, last: Tensor | None = None
    ) -> Tensor:
        """Logits [B, Q, V], or [B, V] of the last token; ``last`` [B]: of this token of each row."""
        slot = torch.arange(n, device=input_ids.device)  # [n]
        real = slot[None, :] >= pad[:, None]  # [B, n]
        if swappable:
            mask = real  # the model asks attention.row_mask for the rest, one kind of layer after the other
        else:
            seen = (slot[None, None, :] <= slots[:, :, None]) & real[:, None, :]  # [B, Q, n]
            seen = seen | (slot[None, None, :] == slots[:, :, None])
            mask = attention.additive(seen[:, None], dtype)  # [B, 1, Q, n]
        places: dict[str, Any] = {cache_name: cache}
        if takes_positions:
            places["position_ids"] = (slots - pad[:, None]).clamp_min(0)
        if last_only and keeps:
            places["logits_to_keep"] = 1 if last is None else last
        out = model.forward(
            input_ids=input_ids,
            attention_mask=mask,
            use_cache=True,
            return_dict=True,
            **places,
        )
        if last is not None:
            row = torch.arange(len(last), device=last.device)
            return out.logits[row, row if keeps else last]
        return out.logits[:, -1] if last_only else out.logits

    return run


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own, asking ``qpass.compile`` for few guards.

    Dynamo keeps its compiled entries, and their limit, on the code object; closures made by one ``def`` share it, so
    a second model's graphs would count against the first one's limit.
    """
    function.__code__ = function.__code__.replace()
    function.guard_filter = argument_guards  # type: ignore[attr-defined]
    return function


def argument_guards(entries: Sequence[Any]) -> list[bool]:
    """Of Dynamo's guards, those on a step's arguments and on torch's global state (grad mode, threads, autocast).

    The others, thousands, look every call for a change of the model that a decoder doesn't make: a millisecond a token.
    """

    def keep(entry: Any) -> bool:
        argument = entry.guard_type == "TENSOR_MATCH" and not isinstance(entry.value, nn.Parameter)
        kinds = ("GLOBAL_STATE", "SHAPE_ENV", "DUPLICATE_INPUT")  # the last: two arguments that are one tensor
        return entry.guard_type in kinds or (argument and not entry.is_global)

    return [keep(entry) for entry in entries]


def probe(model: nn.Module) -> list[LayerShape]:
    """What each layer stores, found by running the forward once on fake tensors (no weight is read, nothing computed).

    Raises :class:`UnsupportedError` with the reason when the model can't run on a static cache with a position a row.
    """
    reason = refuse(model)
    if reason:
        raise UnsupportedError(reason)
    name = type(model).__name__
    run = _forward(model, last_only=True)
    try:
        with (
            torch.no_grad(),
            attention.swapped(attention.configs_of(model)),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            ids = torch.zeros(2, 3, dtype=torch.int64)
            position = torch.zeros(2, dtype=torch.int64)
            cache = ProbeView(position, _slots(position, ids))
            logits = run(ids, cache.slots, position, cache, 3)
    except QpassError as error:
        raise UnsupportedError(f"{name} can't run on a static KV cache: {error}") from error
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedError(f"{name} can't run on a static KV cache: its forward failed with {first!r}") from error
    if not cache.shapes or sorted(cache.shapes) != list(range(len(cache.shapes))):
        raise UnsupportedError(f"{name} can't run on a static KV cache: its layers did not store keys and values in it")
    if logits.dim() != 2:
        raise UnsupportedError(f"{name} can't be decoded: its forward gave logits of shape {tuple(logits.shape)}")
    return [cache.shapes[i] for i in range(len(cache.shapes))]


def refuse(model: nn.Module) -> str | None:
    """Why this model can't have a step, as one sentence, or None."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not hasattr(model, "generate"):
        return f"{name} is not a transformers model with a language-modelling head"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder; the static cache serves decoders only"
    if getattr(model, "_is_stateful", False):
        return f"{name} keeps a recurrent state, which can't be moved back by a position"
    kinds = set(getattr(config, "layer_types", None) or ())
    known = {"full_attention", "sliding_attention", "chunked_attention"}
    if kinds - known:
        return f"{name} has layers of kind {', '.join(sorted(kinds - known))}; the static cache serves {', '.join(sorted(known))}"
    alibi = getattr(config, "alibi", False) or getattr(config, "model_type", "") in ("bloom", "mpt")
    if alibi and not attention.serves(model):
        return f"{name} builds its ALiBi bias from a 2-D mask, so rows can't stand at positions of their own"
    return None
