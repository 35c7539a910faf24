"""The speculative loop: a draft proposes, one forward of the target checks, and what comes out is the target's own text.

Greedy output is what greedy decoding gives, token for token, where the target's kernels give a row the same bits
whatever is computed beside it. Sampled output has exactly the target's distribution (arXiv 2211.17192, 2302.01318).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from qpass.errors import OptionError
from qpass.runtime.accept import accept_greedy, accept_sampled
from qpass.runtime.control import Controller
from qpass.runtime.decoder import Decoder, at_least_two, left_padding
from qpass.runtime.draft import NONE, Proposal, Request, ask, begin, padded
from qpass.runtime.kv import KVCache
from qpass.runtime.sampling import Sampling, block_probabilities
from qpass.runtime.stats import Stats
from qpass.runtime.verify import MOST, likeliest

Stop = Callable[[Sequence[int]], bool]
"""Asked after each new token of a row, with all the row's real tokens: does the row end here?"""


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
        """The mean time of a token after the first; nan when there was none."""
        return sum(self.token_ms) / len(self.token_ms) if self.token_ms else float("nan")


class Speculator:
    """Generates with ``decoder``'s model and lets ``draft`` guess ahead; None: plain decoding with the same interface.

    ``k`` is the number of tokens to draft a round, or "auto": chosen while running, from measured costs and acceptance.
    ``stats`` describes the last generation. One generation at a time: a second one beside it is an OptionError.
    """

    def __init__(self, decoder: Decoder, draft: Any = None, *, k: int | Literal["auto"] = "auto") -> None:
        if k != "auto" and not (isinstance(k, int) and 0 <= k < MOST):
            raise OptionError(f"k is {k!r}; accepted: 'auto' or a whole number from 0 to {MOST - 1}")
        if draft is not None and not callable(getattr(draft, "propose", None)):
            raise OptionError(f"a draft needs a method propose(rows, k); {type(draft).__name__} has none")
        self.decoder, self.draft, self.k = decoder, draft, 0 if draft is None else k
        self.stats = Stats()
        self._busy = False

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        stop: Stop | None = None,
        length: int | None = None,
    ) -> Iterator[list[list[int]]]:
        """Yield one list a step: the new tokens of each row, none for a row that has ended.

        ``input_ids`` [B, S] may be left-padded, with ``attention_mask`` [B, S] zero at the padding. A row ends behind
        its end-of-sequence token (the model's own unless ``eos_token_id`` says otherwise; an empty tuple: never), or
        where ``stop`` says so. ``length`` is the cache's size in tokens, by default what is needed. To cancel, close
        the generator or leave the loop.
        Raises OptionError for an empty prompt, one that doesn't fit, or a mask that isn't left padding.
        """
        how, decoder = sampling or Sampling(), self.decoder
        pad = left_padding(input_ids, attention_mask)
        decoder.check_length(input_ids.shape[1], max_new_tokens)
        eos = decoder.eos(eos_token_id)
        input_ids, pad = at_least_two(input_ids, pad)
        needed = input_ids.shape[1] + max_new_tokens
        cache = decoder.allocate(len(pad), length or needed + MOST)
        cache.check_room(0, needed)
        if self._busy:
            raise OptionError("this speculator is generating already; make one for each generation that runs at a time")
        self._busy = True
        try:
            yield from self._rounds(input_ids, pad, cache, max_new_tokens, how, eos, generator, stop)
        finally:
            self._busy = False

    def _rounds(
        self,
        input_ids: Tensor,
        pad: Tensor,
        cache: KVCache,
        max_new_tokens: int,
        how: Sampling,
        eos: frozenset[int],
        generator: torch.Generator | None,
        stop: Stop | None,
    ) -> Iterator[list[list[int]]]:
        decoder, controller = self.decoder, Controller(self.k, MOST - 1)
        stats = self.stats = Stats(controller)
        rows = [row[n:] for row, n in zip(input_ids.tolist(), pad.tolist(), strict=True)]
        prompts = [len(row) for row in rows]
        running = [True] * len(rows)
        if self.draft is not None:
            begin(self.draft, cache, pad)

        def emit(
            tokens: list[list[int]], accepted: Sequence[int], rejected: Sequence[Sequence[int]]
        ) -> list[list[int]]:
            """Append each row's tokens up to its end, of which the first ``accepted`` are the draft's."""
            new: list[list[int]] = [[] for _ in rows]
            for b, row in enumerate(rows):
                for token in tokens[b] if running[b] else ():
                    row.append(token)
                    new[b].append(token)
                    over = len(row) - prompts[b] >= max_new_tokens
                    if over or token in eos or (stop is not None and stop(row)):
                        running[b] = False
                        break
            stats.emitted(new, accepted, rejected)
            return new

        started = time.perf_counter()
        logits = decoder.prefill(input_ids, pad, cache)
        first = _next(logits, how, rows, generator)
        stats.ttft_ms = 1e3 * (time.perf_counter() - started)
        yield emit([[token] for token in first], [0] * len(rows), [()] * len(rows))
        while any(running):
            started = time.perf_counter()
            left = max(
                max_new_tokens - len(row) + n for row, n, runs in zip(rows, prompts, running, strict=True) if runs
            )
            filled = int(pad.max()) + max(map(len, rows))
            k = max(0, min(controller.choose(), left - 1, self._room(rows), cache.length - filled))
            proposal = self._draft(Request(rows, k, how, generator, controller.go_on, decoder.vocabulary), running)
            drafted = time.perf_counter()
            last = torch.tensor([[row[-1]] for row in rows])
            position = pad + torch.tensor([len(row) - 1 for row in rows])
            tokens, counts = self._check(last, proposal, position, pad, cache, how, rows, generator)
            checked = time.perf_counter()
            guesses = [[token for token in row if token != NONE] for row in proposal.tokens.tolist()]
            alive = [b for b, runs in enumerate(running) if runs]
            new = emit(
                [row[:n] for row, n in zip(tokens, counts, strict=True)],
                [n - 1 for n in counts],
                [row[n - 1 :] for row, n in zip(guesses, counts, strict=True)],
            )
            controller.observe(
                k,
                [len(guesses[b]) for b in alive],
                [counts[b] - 1 for b in alive],
                1e3 * (drafted - started),
                1e3 * (checked - drafted),
                None if proposal.confidences is None else [proposal.confidences[b] for b in alive],
            )
            stats.step_ms.append(1e3 * (time.perf_counter() - started))
            stats.step_tokens.append(sum(map(len, new)))
            yield new

    def _room(self, rows: list[list[int]]) -> int:
        """How many more tokens the model's context has room for, in its fullest row."""
        context = self.decoder.context
        return MOST if context is None else context - max(map(len, rows))

    def _draft(self, request: Request, running: list[bool]) -> Proposal:
        if request.k < 1:
            return Proposal(torch.empty(len(request.rows), 0, dtype=torch.int64))
        proposal = ask(self.draft, request)
        tokens = torch.where(torch.tensor(running)[:, None], proposal.tokens, NONE)
        width = int((tokens != NONE).sum(1).max()) if tokens.numel() else 0
        probs = None if proposal.probs is None else proposal.probs[:, :width]
        return Proposal(tokens[:, :width], probs, proposal.confidences)

    def _check(
        self,
        last: Tensor,  # [B, 1]
        proposal: Proposal,
        position: Tensor,
        pad: Tensor,
        cache: KVCache,
        how: Sampling,
        rows: list[list[int]],
        generator: torch.Generator | None,
    ) -> tuple[list[list[int]], list[int]]:
        """The target's verdict on a round: tokens [B][K+1] and how many of them are new."""
        decoder, drafted = self.decoder, proposal.tokens
        filled = int(position.max()) + 1 + drafted.shape[1]
        simple = how.greedy and not how.needs_tokens
        if simple and drafted.shape[1] == 0:
            token, _ = decoder.likeliest(last, position, pad, cache, filled)
            return token.tolist(), [1] * len(rows)
        block = torch.cat([last, drafted], 1)
        if simple:
            tokens, count = decoder.verify(block, position, pad, cache, filled)
            return tokens.tolist(), count.tolist()
        if drafted.shape[1] == 0:
            logits = decoder.decode(last, position, pad, cache, filled)[:, None]
        else:
            logits = decoder.block(block.clamp_min(0), position, pad, cache, filled)
        p = block_probabilities(logits.float(), how, rows, drafted)
        if how.greedy:
            tokens, count = accept_greedy(drafted, p)
        else:
            uniform = torch.rand(drafted.shape[0], drafted.shape[1] + 1, generator=generator)
            tokens, count = accept_sampled(drafted, p, proposal.probs, uniform)
        return tokens.tolist(), count.tolist()

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
        stop: Stop | None = None,
        on_tokens: Callable[[list[list[int]]], None] | None = None,
    ) -> Generation:
        """Run :meth:`stream` to its end; ``on_tokens`` is called with each step's tokens as they come."""
        before = self.decoder.compile_seconds
        new: list[list[int]] = [[] for _ in range(input_ids.shape[0])]
        steps = self.stream(
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_token_id=eos_token_id,
            generator=generator,
            stop=stop,
        )
        for step in steps:
            for row, tokens in zip(new, step, strict=True):
                row.extend(tokens)
            if on_tokens is not None:
                on_tokens(step)
        fill = self.decoder.pad_token() if pad_token_id is None else pad_token_id
        return Generation(
            sequences=torch.cat([input_ids, padded(new, fill)], 1),
            new_tokens=new,
            ttft_ms=self.stats.ttft_ms,
            token_ms=self.stats.token_ms,
            compile_seconds=self.decoder.compile_seconds - before,
            graphs=self.decoder.graphs,
        )


def _next(logits: Tensor, how: Sampling, rows: list[list[int]], generator: torch.Generator | None) -> list[int]:
    """The token behind the prompt, by the same rule as every later one."""
    if how.greedy and not how.needs_tokens:
        return likeliest(logits)[0][:, 0].tolist()
    nothing = torch.empty(len(rows), 0, dtype=torch.int64)
    p = block_probabilities(logits[:, None].float(), how, rows, nothing)
    if how.greedy:
        return p[:, 0].argmax(-1).tolist()
    return accept_sampled(nothing, p, None, torch.rand(len(rows), 1, generator=generator))[0][:, 0].tolist()
