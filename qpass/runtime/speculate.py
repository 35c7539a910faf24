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
from qpass.runtime.decoder import Decoder, left_padding
from qpass.runtime.draft import NONE, Proposal, Request, ask, begin, label, padded, prompt, read
from qpass.runtime.kv import KVCache
from qpass.runtime.sampling import Sampling, block_probabilities, block_processed
from qpass.runtime.shadow import GUESS, Shadow
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
        self._controller = Controller(self.k, MOST - 1)  # what it learned of costs serves the next text too
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
        show_padding: bool = False,
    ) -> Iterator[list[list[int]]]:
        """Yield one list a step: the new tokens of each row, none for a row that has ended.

        ``input_ids`` [B, S] may be left-padded, with ``attention_mask`` [B, S] zero at the padding. A row ends behind
        its end-of-sequence token (the model's own unless ``eos_token_id`` says otherwise; an empty tuple: never), or
        where ``stop`` says so. ``length`` is the cache's size in tokens, by default what is needed. Penalties and
        processors see a row's real tokens, with ``show_padding`` what stands in front of them too, as transformers
        shows it. To cancel, close the generator or leave the loop.
        Raises OptionError for an empty prompt, one that doesn't fit, or a mask that isn't left padding.
        """
        how, decoder = sampling or Sampling(), self.decoder
        pad = left_padding(input_ids, attention_mask)
        decoder.check_ids(input_ids)
        decoder.check_length(input_ids.shape[1], max_new_tokens)
        eos = decoder.eos(eos_token_id)
        needed = input_ids.shape[1] + max_new_tokens
        cache = decoder.allocate(len(pad), length or needed + MOST)
        cache.check_room(0, needed)
        if self._busy:
            raise OptionError("this speculator is generating already; make one for each generation that runs at a time")
        self._busy = True
        try:
            rows = [row[n:] for row, n in zip(input_ids.tolist(), pad.tolist(), strict=True)]
            heads = [row[:n] if show_padding else [] for row, n in zip(input_ids.tolist(), pad.tolist(), strict=True)]
            target = Checker(decoder, cache, rows, how, heads, generator)
            ends = Ends([len(row) for row in rows], max_new_tokens, eos, stop)
            yield from self._rounds(target, ends)
        finally:
            self._busy = False

    def _rounds(self, target: Checker, ends: Ends) -> Iterator[list[list[int]]]:
        rows, controller, shadow = target.rows, self._controller, Shadow(self.draft)
        controller.renew()
        stats = self.stats = Stats(controller.history, controller.switches)
        if self.draft is not None:
            begin(self.draft, target.cache)
        started = time.perf_counter()
        first = target.first()
        stats.ttft_ms = 1e3 * (time.perf_counter() - started)
        new = ends.append(rows, first)
        stats.emitted(new, [0] * len(rows), [()] * len(rows), [""] * len(rows))
        yield new
        if self.draft is not None and any(ends.running):
            started = time.perf_counter()
            read(self.draft, rows)
            stats.read_ms = 1e3 * (time.perf_counter() - started)
        while any(ends.running):
            started = time.perf_counter()
            k = max(0, min(controller.choose(), ends.left(rows) - 1, target.room()))
            if controller.on:
                shadow.forget()
            else:
                shadow.guess(rows, ends.running)
            proposal = self._propose(target, k, ends.running, controller)
            drafted = time.perf_counter()
            tokens, counts = target.check(proposal)
            checked = time.perf_counter()
            guesses = [[token for token in row if token != NONE] for row in proposal.tokens.tolist()]
            alive = [b for b, runs in enumerate(ends.running) if runs]
            new = ends.append(rows, [row[:n] for row, n in zip(tokens, counts, strict=True)])
            rejected = [row[n - 1 :] for row, n in zip(guesses, counts, strict=True)]
            stats.emitted(new, [n - 1 for n in counts], rejected, proposal.by or [label(self.draft)] * len(rows))
            controller.overhear(GUESS, *shadow.settled(rows))
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
            stats.step_longest.append(max(map(len, new)))
            yield new

    def _propose(self, target: Checker, k: int, running: list[bool], controller: Controller) -> Proposal:
        if k == 0:
            return Proposal(torch.empty(len(running), 0, dtype=torch.int64))
        vocabulary = target.decoder.vocabulary
        proposal = ask(self.draft, Request(target.rows, k, target.how, target.generator, controller.go_on, vocabulary))
        tokens = torch.where(torch.tensor(running)[:, None], proposal.tokens, NONE)
        width = int((tokens != NONE).sum(1).max()) if tokens.numel() else 0
        probs = None if proposal.probs is None else proposal.probs[:, :width]
        return Proposal(tokens[:, :width], probs, proposal.confidences, proposal.by)

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
        show_padding: bool = False,
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
            show_padding=show_padding,
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


@dataclass
class Ends:
    """When each row ends: at an end token, at its length, or where ``stop`` says so."""

    prompts: list[int]
    max_new_tokens: int
    eos: frozenset[int]
    stop: Stop | None
    running: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.running = [True] * len(self.prompts)

    def left(self, rows: Sequence[Sequence[int]]) -> int:
        """The most tokens that a running row may still get."""
        used = zip(rows, self.prompts, self.running, strict=True)
        return max(self.max_new_tokens - len(row) + prompt for row, prompt, runs in used if runs)

    def append(self, rows: list[list[int]], tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        """Append to each running row what comes before its end; returns that."""
        new: list[list[int]] = [[] for _ in rows]
        for b, row in enumerate(rows):
            for token in tokens[b] if self.running[b] else ():
                row.append(token)
                new[b].append(token)
                over = len(row) - self.prompts[b] >= self.max_new_tokens
                if over or token in self.eos or (self.stop is not None and self.stop(row)):
                    self.running[b] = False
                    break
        return new


@dataclass
class Checker:
    """The target's side of a generation: its cache, where each row stands, and its verdict on a round."""

    decoder: Decoder
    cache: KVCache
    rows: list[list[int]]  # real tokens; token i of each is in slot i
    how: Sampling
    heads: list[list[int]]  # what penalties and processors see in front of each row
    generator: torch.Generator | None

    @property
    def simple(self) -> bool:
        """Whether the likeliest token is all that counts: then the graph itself decides."""
        return self.how.greedy and not self.how.needs_tokens

    def room(self) -> int:
        """How many drafted tokens the cache and the model's context have room for, in the fullest row."""
        longest = max(map(len, self.rows))
        context = self.decoder.context
        return min(MOST if context is None else context - longest, self.cache.length - longest)

    def first(self) -> list[list[int]]:
        """The token behind each prompt, by the same rule as every later one."""
        logits = self.decoder.prefill(*prompt(self.rows), self.cache)
        if self.simple:
            return likeliest(logits)[0].tolist()
        nothing = torch.empty(len(self.rows), 0, dtype=torch.int64)
        return self._judge(logits[:, None], Proposal(nothing))[0]

    def check(self, proposal: Proposal) -> tuple[list[list[int]], list[int]]:
        """The new tokens of each row, [B][K+1], and how many of them count."""
        drafted = proposal.tokens
        last = torch.tensor([[row[-1]] for row in self.rows])
        position = torch.tensor([len(row) - 1 for row in self.rows])
        filled = int(position.max()) + 1 + drafted.shape[1]
        where = (position, torch.zeros_like(position), self.cache, filled)
        if drafted.shape[1] == 0:
            if self.simple:
                return self.decoder.likeliest(last, *where)[0].tolist(), [1] * len(self.rows)
            return self._judge(self.decoder.decode(last, *where)[:, None], proposal)
        block = torch.cat([last, drafted], 1)
        if self.simple:
            tokens, count = self.decoder.verify(block, *where)
            return tokens.tolist(), count.tolist()
        return self._judge(self.decoder.block(block.clamp_min(0), *where), proposal)

    def _judge(self, logits: Tensor, proposal: Proposal) -> tuple[list[list[int]], list[int]]:
        """The rule outside of the graph, for logits [B, K+1, V]: what to sample by changes with every call."""
        drafted = proposal.tokens
        seen = [[*head, *row] for head, row in zip(self.heads, self.rows, strict=True)]
        if self.how.greedy:
            tokens, count = accept_greedy(drafted, block_processed(logits, self.how, seen, drafted))
        else:
            p = block_probabilities(logits, self.how, seen, drafted)
            uniform = torch.rand(logits.shape[:2], generator=self.generator, dtype=torch.float64)
            tokens, count = accept_sampled(drafted, p, proposal.probs, uniform)
        return tokens.tolist(), count.tolist()
