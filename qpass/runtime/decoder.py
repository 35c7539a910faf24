"""A model as two compiled steps, prompt and token, and the loop that generates with them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qpass.errors import OptionError, UnsupportedError
from qpass.runtime import attention
from qpass.runtime.kv import KVCache
from qpass.runtime.sampling import Sampling, choose, eos_ids
from qpass.runtime.step import make_prompt, make_step, probe

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

LENGTH_STEP = 64
"""A cache holds a multiple of this many tokens, so that one that is nearly full is no new length a token."""


@dataclass
class Generation:
    """What came out, and what it took. Times are wall clock; ``ttft_ms`` runs from the call to the first token."""

    sequences: Tensor  # [B, prompt + new], padded with the pad token behind a row's end
    new_tokens: list[list[int]]  # a row each, the end-of-sequence token included
    ttft_ms: float
    token_ms: list[float] = field(default_factory=list)  # each token after the first
    compile_seconds: float = 0.0  # spent inside this call; 0 after a warm-up
    graphs: int = 0  # compiled for this decoder so far

    @property
    def tpot_ms(self) -> float:
        """The median time of a token after the first; nan when there was none."""
        if not self.token_ms:
            return float("nan")
        return sorted(self.token_ms)[len(self.token_ms) // 2]


class Decoder:
    """Generates with a causal language model on a static KV cache.

    ``compile`` turns a function into a compiled one; it is called twice, for the prompt step and for the token step,
    so both share whatever it shares between calls (qpass: the packed weights). The default runs them as they are.

    The number of graphs is bounded: one serves every prompt of two tokens or more, one every later token, per batch
    size. The model is the decoder's from then on: its weights may change in place, its structure not.
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
        self.prompt_step = compile(make_prompt(model))
        self.token_step = compile(make_step(model, last_only=True))
        self.graphs = 0
        self.compile_seconds = 0.0
        self._configs = attention.configs_of(model)

    @property
    def context(self) -> int | None:
        """The most tokens the model was made for; None where its config doesn't say."""
        config = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return getattr(text, "max_position_embeddings", None)

    def allocate(self, batch: int, length: int) -> KVCache:
        """A cache for ``batch`` rows of at least ``length`` tokens."""
        return KVCache.allocate(self.shapes, batch, _rounded(length), int8=self.kv_dtype == "int8")

    def prefill(self, input_ids: Tensor, pad: Tensor, cache: KVCache) -> Tensor:
        """Fill the cache's slots 0..S-1 from ``input_ids`` [B, S]; logits of the last token [B, V]."""
        count = input_ids.shape[1]
        cache.check_room(0, count)
        if count == 1:
            return self.decode(input_ids, torch.zeros_like(pad), pad, cache, 1)
        part = cache.first(count)
        ids = input_ids.flatten().view(input_ids.shape)  # one stride for one shape: graphs are compiled for strides too
        torch._dynamo.mark_dynamic(ids, 1)
        return self._run(self.prompt_step, ids, pad, part.keys, part.values)

    def decode(self, input_ids: Tensor, position: Tensor, pad: Tensor, cache: KVCache, filled: int) -> Tensor:
        """One more token a row: ``input_ids`` [B, 1] go to slots ``position`` [B]; logits [B, V].

        ``filled`` is the largest position plus one, on the host, so that nothing has to be read back for it.
        """
        cache.check_room(filled - 1, 1)
        ids = input_ids.flatten()[:, None]
        return self._run(self.token_step, ids, position, pad, cache.keys, cache.values)

    def _run(self, step: Callable[..., Tensor], *args: Any) -> Tensor:
        before, started = counters["stats"]["unique_graphs"], time.perf_counter()
        with torch.no_grad(), attention.swapped(self._configs):
            logits = step(*args)
        compiled = counters["stats"]["unique_graphs"] - before
        if compiled:
            self.graphs += compiled
            self.compile_seconds += time.perf_counter() - started
        return logits

    def warm_up(self, batch: int = 1) -> float:
        """Compile both steps for a batch size, on a small cache that is thrown away; returns the seconds it took."""
        started = time.perf_counter()
        cache = self.allocate(batch, 2 * LENGTH_STEP)
        pad = torch.zeros(batch, dtype=torch.int64)
        ids = torch.zeros(batch, 5, dtype=torch.int64)
        for _ in range(2):  # the first call compiles; the second pays what a first run still leaves
            self.prefill(ids, pad, cache)
            self.decode(ids[:, :1], pad + 5, pad, cache, 6)
        return time.perf_counter() - started

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        length: int | None = None,
    ) -> Iterator[list[int | None]]:
        """Yield one list a step: the new token of each row, None for a row that has ended.

        ``input_ids`` [B, S] may be left-padded, with ``attention_mask`` [B, S] zero at the padding. A row ends behind
        its end-of-sequence token (the model's own unless ``eos_token_id`` says otherwise; an empty tuple: never).
        ``length`` is the cache's size in tokens, by default what prompt and new tokens need.
        Raises OptionError for an empty prompt, one that doesn't fit, or a mask that isn't left padding.
        """
        how = sampling or Sampling()
        pad = left_padding(input_ids, attention_mask)
        batch, count = input_ids.shape
        self._check_length(count, max_new_tokens)
        eos = eos_ids(self._own_eos() if eos_token_id is None else eos_token_id)
        cache = self.allocate(batch, length or count + max_new_tokens)
        cache.check_room(0, count + max_new_tokens)
        tokens = input_ids if how.needs_tokens else None
        running = [True] * batch
        logits = self.prefill(input_ids, pad, cache)
        for filled in range(count, count + max_new_tokens):
            chosen = choose(logits, how, tokens, generator)  # [B]
            row_tokens = chosen.tolist()  # the one look at device data a token
            yield [token if alive else None for token, alive in zip(row_tokens, running, strict=True)]
            running = [alive and token not in eos for token, alive in zip(row_tokens, running, strict=True)]
            if not any(running) or filled + 1 == count + max_new_tokens:
                return
            if tokens is not None:
                tokens = torch.cat([tokens, chosen[:, None]], 1)
            position = torch.full((batch,), filled, dtype=torch.int64)
            logits = self.decode(chosen[:, None], position, pad, cache, filled + 1)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
        on_tokens: Callable[[list[int | None]], None] | None = None,
    ) -> Generation:
        """Run :meth:`stream` to its end; ``on_tokens`` is called with each step's tokens as they come."""
        compiled_before = self.compile_seconds
        rows: list[list[int]] = [[] for _ in range(input_ids.shape[0])]
        marks = [time.perf_counter()]
        steps = self.stream(
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_token_id=eos_token_id,
            generator=generator,
        )
        for step in steps:
            marks.append(time.perf_counter())
            for row, token in zip(rows, step, strict=True):
                if token is not None:
                    row.append(token)
            if on_tokens is not None:
                on_tokens(step)
        times = [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
        fill = self._pad_token() if pad_token_id is None else pad_token_id
        longest = max(map(len, rows))
        new = torch.tensor([row + [fill] * (longest - len(row)) for row in rows], dtype=torch.int64).reshape(
            len(rows), longest
        )
        return Generation(
            sequences=torch.cat([input_ids, new], 1),
            new_tokens=rows,
            ttft_ms=times[0] if times else float("nan"),
            token_ms=times[1:],
            compile_seconds=self.compile_seconds - compiled_before,
            graphs=self.graphs,
        )

    def _check_length(self, prompt: int, new: int) -> None:
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

    def _own_eos(self) -> int | Sequence[int] | None:
        chosen = getattr(self.model, "generation_config", None) or self.model.config
        return getattr(chosen, "eos_token_id", None)

    def _pad_token(self) -> int:
        chosen = getattr(getattr(self.model, "generation_config", None), "pad_token_id", None)
        if chosen is None:
            chosen = getattr(self.model.config, "pad_token_id", None)
        return chosen if chosen is not None else min(eos_ids(self._own_eos()), default=0)


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
