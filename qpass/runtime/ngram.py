"""Drafting without a model: what followed the same words before (prompt lookup, Saxena 2023; LLMA, arXiv 2304.04487)."""

from __future__ import annotations

from collections.abc import Sequence

from qpass.errors import OptionError
from qpass.runtime.rows import synced


class NgramDraft:
    """Proposes what followed the latest earlier occurrence of a row's longest known suffix, in prompt and output.

    Suffixes of ``longest`` down to ``shortest`` tokens are looked for; a row without a match gets no proposal. The
    latest occurrence, not the commonest continuation: on source text it gives 1.37 tokens a step against 1.35 (K = 4,
    150 tokens of prompt), on prose 1.14 against 1.15. Suffixes of more than four tokens gained nothing (1.37), those of
    one token do (1.22 without).

    Each row's index grows with the row; a row that isn't the continuation of one seen before (another conversation, a
    text cut back) is indexed anew.
    """

    label = "n-gram"
    free = True  # a lookup takes microseconds

    def __init__(self, longest: int = 4, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest:
            raise OptionError(f"n-grams of {shortest} to {longest} tokens; accepted: 1 <= shortest <= longest")
        self.longest, self.shortest = longest, shortest
        self._seen: list[_Row] = []

    def propose(self, rows: Sequence[Sequence[int]], k: int) -> list[list[int]]:
        """Up to ``k`` tokens for each of the rows (their real tokens so far)."""
        self._seen = synced(self._seen, rows, lambda: _Row(self.longest, self.shortest))
        return [row.follow(k) for row in self._seen]


class _Row:
    """One row's tokens and where each of its n-grams was last followed by something."""

    def __init__(self, longest: int, shortest: int) -> None:
        self.tokens: list[int] = []
        self.lengths = range(shortest, longest + 1)
        self.follows: dict[tuple[int, ...], int] = {}  # n-gram -> the place behind its latest occurrence

    def extend(self, new: list[int]) -> None:
        tokens, follows = self.tokens, self.follows
        for token in new:
            place = len(tokens)
            for n in self.lengths:
                if n > place:
                    break
                follows[tuple(tokens[place - n :])] = place
            tokens.append(token)

    def follow(self, k: int) -> list[int]:
        """What followed the longest suffix with a match; a copy that reaches the row's end goes on with itself."""
        for n in reversed(self.lengths):
            place = self.follows.get(tuple(self.tokens[-n:])) if n <= len(self.tokens) else None
            if place is not None:
                found = self.tokens[place : place + k]
                period = len(self.tokens) - place
                for i in range(period, k):
                    found.append(found[i - period])
                return found
        return []
