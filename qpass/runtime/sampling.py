"""From logits to a token: temperature, top-k, top-p, min-p, repetition penalty, in transformers' order and meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from qpass.errors import OptionError
from qpass.runtime.search import largest, largest_few

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
        logits = logits.scatter(1, tokens, _penalized(logits.gather(1, tokens), how.repetition_penalty))
    return logits


def _penalized(logits: Tensor, penalty: float) -> Tensor:
    return torch.where(logits < 0, logits * penalty, logits / penalty)


def candidates(logits: Tensor, how: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities [B, C] and the token of each [B, C], None where C is the vocabulary in its own order.

    What top-k, top-p and min-p cut has probability 0. Ties at the k-th place all stay, as in transformers; which of the
    equally likely tokens falls off at top-p's edge is left to the order of the search, there and here. Nothing is
    sorted but as many of the largest as matter: C grows until ties end and top-p's mass is reached.
    """
    logits = logits / how.temperature if how.temperature != 1 else logits
    index: Tensor | None = None
    if how.top_k:
        scores, index = _top_with_ties(logits, how.top_k)
        probs = torch.softmax(scores, -1)
        before = probs.cumsum(-1) - probs
    else:
        probs = torch.softmax(logits, -1)
        if how.top_p < 1:
            for width in (256, 4096, logits.shape[-1]):
                index = largest_few(logits, width)[1]
                reached = probs.gather(-1, index).cumsum(-1)
                if width >= logits.shape[-1] or bool((reached[:, -1] >= how.top_p).all()):
                    break
            assert index is not None
            probs = probs.gather(-1, index)
            before = reached - probs
    if how.top_p < 1:  # ``before`` is the mass of what is likelier: a token stays while that is below top_p
        probs = torch.where(before < how.top_p, probs, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    if how.min_p > 0:
        probs = torch.where(probs >= how.min_p * probs.amax(-1, keepdim=True), probs, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs, index


def _top_with_ties(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and whatever equals the k-th, largest first, -inf behind: scores and index [B, C]."""
    vocabulary = logits.shape[-1]
    k, width = min(k, vocabulary), min(k + 16, vocabulary)
    while True:
        scores, index = largest_few(logits, width)
        kth = scores[:, k - 1 : k]
        more = (scores[:, -1:] == kth) & (kth > -torch.inf)  # the ties may go on
        if width == vocabulary or not bool(more.any()):
            return torch.where(scores >= kth, scores, -torch.inf), index
        width = min(4 * width, vocabulary)


def probabilities(logits: Tensor, how: Sampling, tokens: Tensor | None = None) -> Tensor:
    """The distribution [B, V] that :func:`choose` draws from; one-hot for greedy."""
    return _distribution(processed(logits, how, tokens), how)


def _distribution(logits: Tensor, how: Sampling) -> Tensor:
    if how.greedy:
        return torch.zeros_like(logits).scatter(-1, largest(logits)[:, None], 1.0)
    probs, index = candidates(logits, how)
    return probs if index is None else torch.zeros_like(logits).scatter_add(-1, index, probs)


def choose(
    logits: Tensor, how: Sampling, tokens: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The next token of each row, int64 [B]."""
    logits = processed(logits, how, tokens)
    if how.greedy:
        return largest(logits)
    probs, index = candidates(logits, how)
    drawn = torch.multinomial(probs, 1, generator=generator)  # [B, 1]
    return (drawn if index is None else index.gather(-1, drawn)).squeeze(-1)


def block_probabilities(logits: Tensor, how: Sampling, rows: Sequence[Sequence[int]], drafted: Tensor) -> Tensor:
    """The distribution fp32 [B, Q, V] of every position of a verification, position i of a row having seen i drafts.

    ``logits`` [B, Q, V]; ``rows``: each row's real tokens so far, of any lengths; ``drafted`` int64 [B, Q-1], -1 from
    where on a row proposes nothing. Each position equals :func:`probabilities` of the row's own tokens (no padding) and
    the drafts before it; those behind a row's last proposal are valid distributions of no meaning.
    """
    logits = block_processed(logits, how, rows, drafted)
    return _distribution(logits.flatten(0, 1), how).view(logits.shape)


def block_processed(logits: Tensor, how: Sampling, rows: Sequence[Sequence[int]], drafted: Tensor) -> Tensor:
    """:func:`processed` of every position of a block, fp32 [B, Q, V], with the arguments of :func:`block_probabilities`."""
    logits = logits.float()
    if not how.needs_tokens:
        return logits
    drafts = [list(takewhile(lambda token: token >= 0, row)) for row in drafted.tolist()]
    pairs = zip(logits.unbind(0), rows, drafts, strict=True)
    return torch.stack([_processed_block(own, how, list(row), new) for own, row, new in pairs])


def _processed_block(logits: Tensor, how: Sampling, row: list[int], drafts: list[int]) -> Tensor:
    """:func:`processed` of one row's positions, logits [Q, V]; those behind its drafts stay as they were."""
    if how.processors:
        tokens = torch.tensor([row + drafts])
        only = replace(how, repetition_penalty=1.0)
        seen = [
            processed(logits[i : i + 1].clone(), only, tokens[:, : len(row) + i])
            if i <= len(drafts)
            else logits[i : i + 1]
            for i in range(len(logits))
        ]
        logits = torch.cat(seen)
    if how.repetition_penalty == 1.0:
        return logits
    since = dict.fromkeys(row, 0)  # token -> the first position that has seen it
    for i, token in enumerate(drafts):
        since.setdefault(token, i + 1)
    index = torch.tensor(list(since), dtype=torch.int64)
    seen_there = torch.arange(len(logits))[:, None] >= torch.tensor(list(since.values()))  # [Q, tokens]
    values = logits[:, index]
    return logits.index_copy(1, index, torch.where(seen_there, _penalized(values, how.repetition_penalty), values))


def sampling_of(processors: Sequence[Processor], do_sample: bool) -> Sampling:
    """transformers' prepared ``LogitsProcessorList`` as a Sampling of the same distribution.

    The longest end of the list that is plain penalty, temperature, top-k, top-p and min-p, in this order, becomes
    numbers; what stands before it stays a processor, in its order, so an unknown one behind a warper keeps that as well.
    """
    numbers: dict[str, Any] = {}
    stage = len(_STAGES)
    rest = list(processors)
    while rest:
        place, value = _as_number(rest[-1])
        if place >= stage or (not do_sample and place > 0):
            break
        stage = place
        if place < 0:
            break
        numbers[_STAGES[place]] = value
        rest.pop()
    return Sampling(**({"temperature": float(do_sample)} | numbers), processors=tuple(rest))


_STAGES = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")


def _as_number(processor: Processor) -> tuple[int, float]:
    """Which of the stages a transformers processor is, with its number; -1 for one that is no stage exactly."""
    from transformers.generation import logits_process as theirs

    stages: tuple[tuple[type, str], ...] = (
        (theirs.RepetitionPenaltyLogitsProcessor, "penalty"),
        (theirs.TemperatureLogitsWarper, "temperature"),
        (theirs.TopKLogitsWarper, "top_k"),
        (theirs.TopPLogitsWarper, "top_p"),
        (theirs.MinPLogitsWarper, "min_p"),
    )
    for place, (kind, name) in enumerate(stages):
        if type(processor) is kind:
            value = getattr(processor, name)
            cuts_all = getattr(processor, "filter_value", -torch.inf) == -torch.inf
            keeps_one = name == "top_k" or getattr(processor, "min_tokens_to_keep", 1) == 1  # top_k is raised to it
            whole_text = getattr(processor, "prompt_ignore_length", None) is None
            return (place if cuts_all and keeps_one and whole_text and value > 0 else -1), value
    return -1, 0.0


def eos_ids(eos: int | Sequence[int] | None) -> frozenset[int]:
    """One id, several or none, as a set."""
    if eos is None:
        return frozenset()
    return frozenset((eos,)) if isinstance(eos, int) else frozenset(int(token) for token in eos)
