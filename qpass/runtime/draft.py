"""What a draft is: anything that proposes tokens for rows of text; and models that do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from qpass.errors import OptionError
from qpass.runtime.decoder import Decoder
from qpass.runtime.kv import KVCache
from qpass.runtime.sampling import Sampling, block_probabilities
from qpass.runtime.shorten import ShortHead
from qpass.runtime.verify import MOST, likeliest

Rows = Sequence[Sequence[int]]
NONE = -1
"""In a proposal: no token here, nor behind."""


@dataclass(frozen=True)
class Proposal:
    """Tokens for each row, and the distributions that they were drawn from where they were drawn."""

    tokens: Tensor  # int64 [B, K]; NONE from where on a row proposes nothing
    probs: Tensor | None = None  # fp32 [B, K, V]; None: each token was certain (greedy, n-gram)
    confidences: tuple[tuple[float, ...], ...] | None = None  # a row each: how likely the draft held each of its tokens
    by: tuple[str, ...] | None = None  # a row each: which of several drafts proposed


@dataclass(frozen=True)
class Request:
    """What the loop asks a draft that can take more than ``propose(rows, k)``."""

    rows: Rows
    k: int
    sampling: Sampling = field(default_factory=Sampling)
    generator: torch.Generator | None = None
    go_on: Callable[[Sequence[float]], bool] | None = None  # is another token worth it, given those so far?
    vocabulary: int | None = None  # of the target: no token beyond it is of use


class Draft(Protocol):
    """Proposes at most ``k`` tokens that may follow each row; fewer or none is as good an answer.

    ``rows`` holds each row's real tokens so far, prompt and output, without padding. Optional further methods:
    ``begin(cache)`` at the start of a generation, ``read(rows)`` once the prompt and its first token are known, ``answer(request)``
    in place of ``propose``.
    """

    def propose(self, rows: Rows, k: int) -> Proposal | Tensor | list[list[int]]: ...


def ask(draft: Any, request: Request) -> Proposal:
    """What ``draft`` proposes, checked. Raises OptionError for an answer that can't be one."""
    if hasattr(draft, "answer"):
        return draft.answer(request)
    given = draft.propose(request.rows, request.k)
    name, batch = type(draft).__name__, len(request.rows)
    if isinstance(given, Proposal):
        tokens, probs = given.tokens, given.probs
    elif isinstance(given, Tensor):
        tokens, probs = given, None
    else:
        tokens, probs = padded(given, NONE), None
    if tokens.dim() != 2 or tokens.shape[0] != batch or tokens.dtype != torch.int64:
        raise OptionError(
            f"{name}.propose gave tokens of shape {tuple(tokens.shape)} and type {tokens.dtype} for {batch} rows; "
            "accepted: a list of token ids a row, or int64 [rows, k]"
        )
    tokens = tokens[:, : request.k]
    gone = (tokens < 0).cumsum(1) > 0
    tokens = torch.where(gone, NONE, tokens)
    if request.vocabulary is not None and tokens.numel() and int(tokens.max()) >= request.vocabulary:
        raise OptionError(
            f"{name}.propose gave token {int(tokens.max())}; the target's vocabulary has {request.vocabulary} tokens"
        )
    if probs is not None:
        wanted = (*tokens.shape, request.vocabulary)
        if tuple(probs.shape) != wanted:
            raise OptionError(f"{name}.propose gave probs of shape {tuple(probs.shape)}; accepted: {wanted}")
        probs = torch.where(gone[:, :, None], 0.0, probs.float())
    return Proposal(tokens, probs, given.confidences if isinstance(given, Proposal) else None)


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Lists of token ids as one int64 [B, T], short rows filled up at their end."""
    longest = max(map(len, rows))
    full = [[*row, *[fill] * (longest - len(row))] for row in rows]
    return torch.tensor(full, dtype=torch.int64).reshape(len(rows), longest)


def prompt(rows: Rows) -> tuple[Tensor, Tensor]:
    """Rows as a prompt's step wants them: ids [B, S], S at least 2, short rows filled up behind; their counts [B]."""
    ids = padded(rows, 0)
    return (ids if ids.shape[1] > 1 else torch.nn.functional.pad(ids, (0, 1))), torch.tensor([len(row) for row in rows])


class FirstOf:
    """Several drafts: each row takes the proposal of the first that has one, the costlier ones behind."""

    def __init__(self, *drafts: Any) -> None:
        self.drafts = drafts

    def begin(self, cache: KVCache) -> None:
        for draft in self.drafts:
            begin(draft, cache)

    def read(self, rows: Rows) -> None:
        for draft in self.drafts:
            read(draft, rows)

    def warm_up(self, batch: int, *, greedy: bool) -> None:
        for draft in self.drafts:
            warm_up(draft, batch, greedy=greedy)

    def propose(self, rows: Rows, k: int) -> Proposal:
        return self.answer(Request(rows, k))

    def answer(self, request: Request) -> Proposal:
        found: list[list[int]] = [[] for _ in request.rows]
        drawn: dict[int, Tensor] = {}  # rows whose tokens were drawn: from these, [K, V]
        sure: list[tuple[float, ...]] = [() for _ in request.rows]
        by = [""] * len(found)
        for draft in self.drafts:
            if all(found):
                break
            proposal = ask(draft, request)
            for b, row in enumerate(proposal.tokens.tolist()):
                if not found[b]:
                    found[b] = list(itertools.takewhile(lambda token: token != NONE, row))
                    sure[b] = proposal.confidences[b] if proposal.confidences else ()
                    by[b] = label(draft)
                    if found[b] and proposal.probs is not None:
                        drawn[b] = proposal.probs[b, : len(found[b])]
        tokens = padded(found, NONE)
        return Proposal(tokens, _mixed(tokens, drawn), tuple(sure) if any(sure) else None, tuple(by))


def _mixed(tokens: Tensor, drawn: dict[int, Tensor]) -> Tensor | None:
    """What each row's tokens [B, K] were drawn from, fp32 [B, K, V]; a row that isn't in ``drawn`` was certain of its own."""
    if not drawn:
        return None
    one = next(iter(drawn.values()))
    probs = one.new_zeros(*tokens.shape, one.shape[-1])
    certain = tokens != NONE
    probs.scatter_(-1, tokens.clamp_min(0)[..., None], certain[..., None].to(probs.dtype))
    for b, row in drawn.items():
        probs[b, : len(row)] = row
    return probs


def label(draft: Any) -> str:
    """What a draft is called where its tokens are shown."""
    return getattr(draft, "label", type(draft).__name__)


def begin(draft: Any, cache: KVCache) -> None:
    """Tell a draft that wants to know that a generation starts on this cache of the target."""
    if hasattr(draft, "begin"):
        draft.begin(cache)


def read(draft: Any, rows: Rows) -> None:
    """Have a draft that has to read a text before it proposes do so now: what that takes is no round's cost."""
    if hasattr(draft, "read"):
        draft.read(rows)


def warm_up(draft: Any, batch: int, *, greedy: bool) -> None:
    """Have a draft that compiles something do so before it is needed."""
    if hasattr(draft, "warm_up"):
        draft.warm_up(batch, greedy=greedy)


class ModelDraft:
    """A smaller model of the same vocabulary, on a cache of its own.

    It remembers what its cache holds and feeds what is new of each row: after a round that is the target's own token
    and, where everything was accepted, the last drafted one.
    """

    label = "draft"

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._cache: KVCache | None = None
        self._held: list[list[int]] = []  # the tokens whose keys and values the cache holds
        self._room = 0
        head = decoder.model.get_output_embeddings()
        self._see: Callable[[Iterable[int]], None] = head.see if isinstance(head, ShortHead) else lambda tokens: None

    def begin(self, cache: KVCache) -> None:
        self._room = cache.length

    def read(self, rows: Rows) -> None:
        """Raises OptionError for a text that is longer than the draft's context."""
        if self._room_for(rows) < 1:
            raise OptionError(
                f"the draft {type(self.decoder.model).__name__} was made for {self.decoder.context} tokens and the text has "
                f"{max(map(len, rows))}; give a draft with a longer context, or none"
            )
        if self._behind(rows, 1) is None:
            self._read(rows)

    def warm_up(self, batch: int, *, greedy: bool) -> None:
        self.decoder.warm_up(
            batch, steps=("prompt", "likeliest", "likeliest of several") if greedy else ("prompt", "decode", "block")
        )

    def propose(self, rows: Rows, k: int) -> Proposal:
        return self.answer(Request(rows, k))

    def answer(self, request: Request) -> Proposal:
        rows, k = request.rows, min(request.k, self._room_for(request.rows))
        if k < 1:
            return Proposal(torch.empty(len(rows), 0, dtype=torch.int64))
        q = self._behind(rows, k)
        if q is None:
            self._read(rows)
            q = min(2, *map(len, rows))
        self._held = []  # whatever ends this early leaves a cache that claims nothing
        assert self._cache is not None
        self._see(token for row in rows for token in row[-q:])
        chain = Chain(self.decoder, self._cache, request)
        chain.read(torch.tensor([list(row[-q:]) for row in rows]), torch.tensor([len(row) - q for row in rows]))
        chain.run(k)
        self._held = [[*row, *new[:-1]] for row, new in zip(rows, chain.tokens.tolist(), strict=True)]
        return chain.proposal()

    def _room_for(self, rows: Rows) -> int:
        """How many more tokens the model's context holds behind the longest row."""
        context = self.decoder.context
        return MOST if context is None else context - max(map(len, rows))

    def _behind(self, rows: Rows, k: int) -> int | None:
        """How many last tokens of each row to feed; None where the rows are to be read anew."""
        longest, shortest = max(map(len, rows)), min(map(len, rows))
        if self._cache is None or len(self._held) != len(rows) or longest + k > self._cache.length:
            return None
        q = max(2, *(len(row) - _common(row, held) for row, held in zip(rows, self._held, strict=True)))
        return q if q <= shortest and 2 * q <= max(longest, 2 * MOST) else None

    def _read(self, rows: Rows) -> None:
        self._held = []
        longest = max(map(len, rows))
        if self._cache is None or self._cache.batch != len(rows) or self._cache.length < longest + MOST:
            self._cache = self.decoder.allocate(len(rows), max(longest + MOST, self._room))
        self._see(token for row in rows for token in row)
        self.decoder.prefill(*prompt(rows), self._cache)
        self._held = [list(row) for row in rows]


class LayersDraft:
    """The target's own first layers with its norm and head, on the target's packed weights and on its cache.

    What these layers write at a slot is what verification writes there again, so nothing has to be caught up with.
    ``decoder`` decodes with the shortened model (:func:`qpass.runtime.shorten.first_layers`).
    """

    label = "first layers"

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._cache: KVCache | None = None

    def begin(self, cache: KVCache) -> None:
        layers = len(self.decoder.shapes)
        self._cache = KVCache(cache.keys[:layers], cache.values[:layers])

    def warm_up(self, batch: int, *, greedy: bool) -> None:
        self.decoder.warm_up(batch, steps=("likeliest" if greedy else "decode",))

    def propose(self, rows: Rows, k: int) -> Proposal:
        return self.answer(Request(rows, k))

    def answer(self, request: Request) -> Proposal:
        if self._cache is None:
            raise OptionError(
                "a draft of the target's own layers works on the target's cache, so only within a speculator"
            )
        chain = Chain(self.decoder, self._cache, request)
        position = torch.tensor([len(row) - 1 for row in request.rows])
        chain.read(torch.tensor([[row[-1]] for row in request.rows]), position)
        chain.run(request.k)
        return chain.proposal()


class Chain:
    """One round of a model that drafts: token after token, until k or until another isn't worth its time."""

    def __init__(self, decoder: Decoder, cache: KVCache, request: Request) -> None:
        self._decoder, self._cache, self._request = decoder, cache, request
        self._simple = request.sampling.greedy and not request.sampling.needs_tokens
        self._next = torch.tensor([len(row) for row in request.rows])  # [B]: the slot of the token drafted last
        self._drafted: list[Tensor] = []  # [B, 1] each
        self._probs: list[Tensor] = []  # [B, V] each
        self._sure: list[list[float]] = [[] for _ in request.rows]

    @property
    def tokens(self) -> Tensor:
        """All drafted so far, int64 [B, K]."""
        return torch.cat(self._drafted, 1)

    def read(self, block: Tensor, position: Tensor) -> None:
        """Start with what the cache lacks of each row, [B, Q] from slot ``position`` on."""
        *earlier, last = block.split(MOST, 1)
        for piece in earlier:
            self._decoder.likeliest(piece, *self._where(piece, position))
            position = position + piece.shape[1]
        self._step(last, position)

    def run(self, k: int) -> None:
        """Go on from the token drafted last."""
        go_on = self._request.go_on
        while len(self._drafted) < k and (go_on is None or any(map(go_on, self._sure))):
            self._step(self._drafted[-1], self._next)
            self._next = self._next + 1

    def proposal(self) -> Proposal:
        tokens, vocabulary = self.tokens, self._request.vocabulary
        if vocabulary is not None:
            tokens = torch.where((tokens >= vocabulary).cumsum(1) > 0, NONE, tokens)
        return Proposal(tokens, torch.stack(self._probs, 1) if self._probs else None, tuple(map(tuple, self._sure)))

    def _where(self, block: Tensor, position: Tensor) -> tuple[Tensor, Tensor, KVCache, int]:
        return position, torch.zeros_like(position), self._cache, int(position.max()) + block.shape[1]

    def _step(self, block: Tensor, position: Tensor) -> None:
        where = self._where(block, position)
        if self._simple:
            self._keep(*self._decoder.likeliest(block, *where))
        elif block.shape[1] == 1:
            self._choose(self._decoder.decode(block, *where))
        else:
            self._choose(self._decoder.block(block, *where)[:, -1])

    def _choose(self, logits: Tensor) -> None:
        """Choose from logits [B, V] as the target would: a drawn token comes with its distribution."""
        how, vocabulary = self._request.sampling, self._request.vocabulary or logits.shape[-1]
        logits = logits[:, :vocabulary].float()  # what the target can't say is not to be drawn
        if self._simple:
            self._keep(*likeliest(logits))
            return
        given = self.tokens.tolist() if self._drafted else [[]] * len(logits)
        rows = [[*row, *new] for row, new in zip(self._request.rows, given, strict=True)]
        probs = block_probabilities(logits[:, None], how, rows, torch.empty(len(rows), 0, dtype=torch.int64))[:, 0]
        if how.greedy:
            token = probs.argmax(-1, keepdim=True)
            self._keep(token, torch.softmax(logits, -1).gather(1, token)[:, 0])
            return
        token = torch.multinomial(probs, 1, generator=self._request.generator)
        self._keep(token, probs.gather(1, token)[:, 0])
        self._probs.append(torch.nn.functional.pad(probs, (0, vocabulary - probs.shape[1])))

    def _keep(self, token: Tensor, probability: Tensor) -> None:
        self._drafted.append(token)
        for sure, each in zip(self._sure, probability.tolist(), strict=True):
            sure.append(each)


def _common(row: Sequence[int], held: Sequence[int]) -> int:
    """How many first tokens agree; as a rule all of ``held`` but its last few."""
    n = min(len(row), len(held))
    if list(row[:n]) == list(held[:n]):
        return n
    return next(i for i in range(n) if row[i] != held[i])
