"""From logits to a token: temperature, top-k, top-p, min-p, repetition penalty, in transformers' order and meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.errors import OptionError

BLOCK = 128
"""Entries of the vocabulary that a search over it looks at together; a divisor of most vocabularies' sizes."""

Processor = Callable[[Tensor, Tensor], Tensor]
"""(tokens so far [B, T], logits [B, V]) -> logits [B, V]; any transformers LogitsProcessor is one."""


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off.

    ``processors`` run first, in their order, on fp32 logits. Raises OptionError for a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    processors: tuple[Processor, ...] = ()

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, self.temperature >= 0, "a number >= 0 (0 is greedy)")
        _in_range(
            "top_k", self.top_k, self.top_k >= 0 and int(self.top_k) == self.top_k, "a whole number >= 0 (0 is off)"
        )
        _in_range("top_p", self.top_p, 0 < self.top_p <= 1, "a number in (0, 1] (1 is off)")
        _in_range("min_p", self.min_p, 0 <= self.min_p <= 1, "a number in [0, 1] (0 is off)")
        _in_range("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "a number > 0 (1 is off)")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def needs_tokens(self) -> bool:
        """Whether a choice depends on the tokens before it."""
        return self.repetition_penalty != 1.0 or bool(self.processors)


def _in_range(name: str, value: float, good: bool, accepted: str) -> None:
    if not good:
        raise OptionError(f"{name} is {value!r}; accepted: {accepted}")


def processed(logits: Tensor, how: Sampling, tokens: Tensor | None = None) -> Tensor:
    """fp32 logits [B, V] after the processors and the repetition penalty over ``tokens`` [B, T]."""
    logits = logits.float()
    if not how.needs_tokens:
        return logits
    if tokens is None:
        raise OptionError("a repetition penalty or a logits processor needs the tokens so far")
    for processor in how.processors:
        logits = processor(tokens, logits)
    if how.repetition_penalty != 1.0:
        seen = logits.gather(1, tokens)
        seen = torch.where(seen < 0, seen * how.repetition_penalty, seen / how.repetition_penalty)
        logits = logits.scatter(1, tokens, seen)
    return logits


def candidates(logits: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities [B, C], largest first, and the token of each [B, C]; what top-k, top-p, min-p cut has probability 0.

    C is ``top_k`` where that is set: then nothing is sorted but the k largest. Ties at the k-th place are cut at k,
    where transformers keeps all of them.
    """
    logits = logits / how.temperature
    if how.top_k:
        scores, index = torch.topk(logits, min(how.top_k, logits.shape[-1]), dim=-1)
    elif how.top_p < 1 or how.min_p > 0:
        scores, index = torch.sort(logits, dim=-1, descending=True)
    else:
        scores, index = logits, torch.arange(logits.shape[-1]).expand_as(logits)
    probs = torch.softmax(scores, -1)
    if how.top_p < 1:
        before = probs.cumsum(-1) - probs  # the mass of what is likelier: a token stays while that is below top_p
        probs = torch.where(before < how.top_p, probs, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    if how.min_p > 0:
        probs = torch.where(probs >= how.min_p * probs.amax(-1, keepdim=True), probs, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs, index


def probabilities(logits: Tensor, how: Sampling, tokens: Tensor | None = None) -> Tensor:
    """The distribution [B, V] that :func:`choose` draws from; one-hot for greedy."""
    logits = processed(logits, how, tokens)
    if how.greedy:
        return torch.nn.functional.one_hot(largest(logits), logits.shape[-1]).float()
    probs, index = candidates(logits, how)
    return torch.zeros_like(logits).scatter(-1, index, probs)


def choose(
    logits: Tensor, how: Sampling, tokens: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The next token of each row, int64 [B]."""
    logits = processed(logits, how, tokens)
    if how.greedy:
        return largest(logits)
    probs, index = candidates(logits, how)
    drawn = torch.multinomial(probs, 1, generator=generator)  # [B, 1]
    return index.gather(-1, drawn).squeeze(-1)


def largest(logits: Tensor) -> Tensor:
    """The first index of the largest value, int64 [...]; exactly ``logits.argmax(-1)``, NaN first, in a tenth of its time.

    torch's argmax isn't vectorized (8 rows of 152k bf16 logits: 2.3 ms); its maximum is. So: the best block, then in it.
    """
    block = in_blocks(logits, torch.amax).argmax(-1)
    return block * BLOCK + block_at(logits, block, -torch.inf).argmax(-1)


def in_blocks(values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """``reduce`` of each block of the last dimension: [..., V] -> [..., ceil(V / BLOCK)]."""
    rest = values.shape[-1] % BLOCK
    whole = values.shape[-1] - rest
    parts = [reduce(values[..., :whole].unflatten(-1, (whole // BLOCK, BLOCK)), dim=-1)] if whole else []
    if rest:
        parts.append(reduce(values[..., whole:], dim=-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def block_at(values: Tensor, block: Tensor, fill: float) -> Tensor:
    """The values of one block a row, [..., min(BLOCK, V)], with ``fill`` behind the end of the last one."""
    last = values.shape[-1] - 1
    index = block[..., None] * BLOCK + torch.arange(min(BLOCK, last + 1), device=values.device)
    return torch.where(index <= last, values.gather(-1, index.clamp_max(last)), fill)


def eos_ids(eos: int | Sequence[int] | None) -> frozenset[int]:
    """One id, several or none, as a set."""
    if eos is None:
        return frozenset()
    return frozenset((eos,)) if isinstance(eos, int) else frozenset(int(token) for token in eos)
