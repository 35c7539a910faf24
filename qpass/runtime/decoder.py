"""A model as compiled steps on a static KV cache: a prompt, the next token, several tokens, their verification."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qpass.errors import OptionError, UnsupportedError
from qpass.runtime import attention
from qpass.runtime.kv import KVCache
from qpass.runtime.sampling import eos_ids
from qpass.runtime.shortcut import Shortcut
from qpass.runtime.step import make_prompt, make_step, probe
from qpass.runtime.verify import MOST, make_likely, make_verify

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

LENGTH_STEP = 64
"""A cache holds a multiple of this many tokens, so that one that is nearly full is no new length a token."""


class Decoder:
    """The steps of a causal language model, each compiled when it is first used.

    ``compile`` turns a function into a compiled one; it is called once for each kind of step, so all share whatever
    it shares between calls (qpass: the packed weights). The default runs them as they are.

    The number of graphs is bounded: per batch size, one serves every prompt of two tokens or more, two the likeliest
    next token (behind one new token, behind several), one every verification, and two give logits, of one token and of several. The model is the
    decoder's from then on: its weights may change in place, its structure not.
    ``kv_dtype`` "int8" keeps keys and values as codes with a scale a token and head, in half of bfloat16's memory.
    Raises UnsupportedError for a model that can't run on a static cache; ``model.generate()`` is then the way.
    """

    def __init__(self, model: nn.Module, compile: Compile | None = None, *, kv_dtype: str | None = None) -> None:
        if kv_dtype not in (None, "int8"):
            raise OptionError(f"kv_dtype is {kv_dtype!r}; accepted: None (the model's own) and 'int8'")
        if kv_dtype and not attention.serves(model):
            raise UnsupportedError(
                f"{type(model).__name__} computes its attention by itself, so its cache can't be int8"
            )
        self.kv_dtype = kv_dtype
        compile = compile or (lambda function: function)
        self.attention_refusal = attention.prepare()  # why attention is plain torch here, None where it is native
        attention.keep_tables(model)
        self.model: Any = model
        self.shapes = probe(model)
        self._compile = compile
        self.graphs = 0
        self.compile_seconds = 0.0
        self._configs = attention.configs_of(model)
        self._shortcuts: dict[Callable[..., Any], Shortcut] = {}

    @property
    def context(self) -> int | None:
        """The most tokens the model was made for; None where its config doesn't say."""
        config = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return getattr(text, "max_position_embeddings", None)

    def allocate(self, batch: int, length: int) -> KVCache:
        """A cache for ``batch`` rows of at least ``length`` tokens."""
        return KVCache.allocate(self.shapes, batch, _rounded(length), int8=self.kv_dtype == "int8")

    def prefill(self, input_ids: Tensor, count: Tensor, cache: KVCache) -> Tensor:
        """Fill the cache from slot 0 on from ``input_ids`` [B, S], of which row b has ``count[b]``, the rest anything;
        logits of each row's last token [B, V]. S is at least 2, so that one graph serves every length."""
        width = input_ids.shape[1]
        cache.check_room(0, width)
        part = cache.first(width)
        ids = input_ids.flatten().view(input_ids.shape)  # one stride for one shape: graphs are compiled for strides too
        torch._dynamo.mark_dynamic(ids, 1)
        return self._run(self.prompt_step, ids, count, part.keys, part.values)

    def decode(self, input_ids: Tensor, position: Tensor, pad: Tensor, cache: KVCache, filled: int) -> Tensor:
        """One more token a row: ``input_ids`` [B, 1] go to slots ``position`` [B]; logits [B, V].

        ``filled`` is the largest position plus one, on the host, so that nothing has to be read back for it.
        """
        cache.check_room(filled - 1, 1)
        return self._step(self.token_step, input_ids.flatten()[:, None], position, pad, cache)

    @functools.cached_property
    def prompt_step(self) -> Callable[..., Any]:
        return self._compile(make_prompt(self.model))

    @functools.cached_property
    def token_step(self) -> Callable[..., Any]:
        return self._compile(make_step(self.model, last_only=True))

    @functools.cached_property
    def verify_step(self) -> Callable[..., Any]:
        return self._compile(make_verify(self.model))

    @functools.cached_property
    def block_step(self) -> Callable[..., Any]:
        return self._compile(make_step(self.model, last_only=False))

    @functools.cached_property
    def likely_step(self) -> Callable[..., Any]:
        return self._compile(make_likely(self.model))

    def verify(
        self, block: Tensor, position: Tensor, pad: Tensor, cache: KVCache, filled: int
    ) -> tuple[Tensor, Tensor]:
        """Check drafted tokens against the greedy choice, see :mod:`qpass.runtime.verify`: tokens [B, Q], count [B]."""
        return self._several(self.verify_step, block, position, pad, cache, filled)

    def block(self, input_ids: Tensor, position: Tensor, pad: Tensor, cache: KVCache, filled: int) -> Tensor:
        """Logits [B, Q, V] of several tokens a row, written to the slots from ``position`` on."""
        return self._several(self.block_step, input_ids, position, pad, cache, filled)

    def likeliest(
        self, input_ids: Tensor, position: Tensor, pad: Tensor, cache: KVCache, filled: int
    ) -> tuple[Tensor, Tensor]:
        """Feed one or more tokens a row; the likeliest next token [B, 1] and its probability [B]."""
        return self._several(self.likely_step, input_ids, position, pad, cache, filled)

    def _several(
        self, step: Callable[..., Any], ids: Tensor, position: Tensor, pad: Tensor, cache: KVCache, filled: int
    ) -> Any:
        q = ids.shape[1]
        cache.check_room(filled - q, q)
        ids = ids.flatten().view(ids.shape)
        if q > 1:
            torch._dynamo.mark_dynamic(ids, 1, min=2, max=MOST)
        return self._step(step, ids, position, pad, cache)

    def _step(self, step: Callable[..., Any], ids: Tensor, position: Tensor, pad: Tensor, cache: KVCache) -> Any:
        if step not in self._shortcuts:
            self._shortcuts[step] = Shortcut(self.model)
        return self._shortcuts[step](functools.partial(self._run, step), (ids, position, pad), cache)

    def _run(self, step: Callable[..., Any], *args: Any) -> Any:
        before, started = counters["stats"]["unique_graphs"], time.perf_counter()
        with torch.no_grad(), attention.swapped(self._configs):
            logits = step(*args)
        compiled = counters["stats"]["unique_graphs"] - before
        if compiled:
            self.graphs += compiled
            self.compile_seconds += time.perf_counter() - started
        return logits

    def warm_up(self, batch: int = 1, *, steps: Sequence[str] = ("prompt", "likeliest")) -> float:
        """Compile steps for a batch size, on a small cache that is thrown away; returns the seconds it took.

        ``steps`` are of "prompt", "likeliest" (a greedy token), "likeliest of several" (behind several new ones),
        "decode" (logits of one token), "verify" and "block" (logits of several).
        """
        started = time.perf_counter()
        cache = self.allocate(batch, 2 * LENGTH_STEP)
        pad = torch.zeros(batch, dtype=torch.int64)
        ids = torch.zeros(batch, 5, dtype=torch.int64)
        for _ in range(2):  # the first call compiles; the second pays what a first run still leaves
            for step in steps:
                if step == "prompt":
                    self.prefill(ids, pad + 5, cache)
                elif step in ("verify", "block"):
                    getattr(self, step)(ids, pad + 5, pad, cache, 10)
                elif step == "likeliest of several":
                    self.likeliest(ids, pad + 5, pad, cache, 10)
                else:
                    getattr(self, step)(ids[:, :1], pad + 5, pad, cache, 6)
        return time.perf_counter() - started

    @property
    def vocabulary(self) -> int:
        """The number of logits."""
        return self.model.get_output_embeddings().weight.shape[0]

    def check_ids(self, input_ids: Tensor) -> None:
        """Raise OptionError for a token that the model's embedding doesn't have: compiled code would end the process."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        least, most = (int(end) for end in input_ids.aminmax())
        if least < 0 or most >= rows:
            raise OptionError(f"token {least if least < 0 else most} is not in the vocabulary of {rows} tokens")

    def check_length(self, prompt: int, new: int) -> None:
        """Raise OptionError unless that many prompt and new tokens fit into the model's context."""
        if new < 1:
            raise OptionError(f"max_new_tokens is {new}; accepted: a whole number >= 1")
        if self.context is None or prompt + new <= self.context:
            return
        if prompt >= self.context:
            raise OptionError(f"the prompt has {prompt} tokens; the model's context is {self.context}")
        raise OptionError(
            f"the prompt's {prompt} tokens and max_new_tokens {new} exceed the model's context of {self.context}; "
            f"at most {self.context - prompt} new tokens fit"
        )

    def eos(self, given: int | Sequence[int] | None = None) -> frozenset[int]:
        """The ids that end a row: those given, or else the model's own."""
        chosen = getattr(self.model, "generation_config", None) or self.model.config
        return eos_ids(getattr(chosen, "eos_token_id", None) if given is None else given)

    def pad_token(self) -> int:
        chosen = getattr(getattr(self.model, "generation_config", None), "pad_token_id", None)
        if chosen is None:
            chosen = getattr(self.model.config, "pad_token_id", None)
        return chosen if chosen is not None else min(self.eos(), default=0)


def left_padding(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The number of padding tokens in front of each row, int64 [B]. Raises OptionError with what is wrong."""
    if input_ids.dim() != 2 or input_ids.shape[0] == 0:
        raise OptionError(f"input_ids have shape {tuple(input_ids.shape)}; accepted: [batch, tokens]")
    if input_ids.shape[1] == 0:
        raise OptionError("the prompt is empty; give at least one token")
    if attention_mask is None:
        return torch.zeros(input_ids.shape[0], dtype=torch.int64)
    if attention_mask.shape != input_ids.shape:
        raise OptionError(f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}")
    real = attention_mask != 0
    if not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise OptionError(
            "a batch must be padded on the left: each row of attention_mask is zeros, then ones, at least one"
        )
    return (~real).sum(1)


def _rounded(tokens: int) -> int:
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP
