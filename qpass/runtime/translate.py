"""A draft with another tokenizer than the target's: it reads the row's text, and its words come back as the target's ids.

Universal assisted generation (Timor et al., arXiv 2502.05202, their string-level exact match). A translated token is a
guess like any other: what doesn't fit is not proposed, and the target checks the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from qpass.runtime.draft import NONE, Request, ask, begin, read, warm_up
from qpass.runtime.kv import KVCache
from qpass.runtime.rows import synced

CONTEXT = 8
"""Tokens before the end of a text that decide how it goes on: tokenizers split text into words before they merge."""
TAIL = 400
"""Characters at the end of a row, up to twice as many, are encoded again each time; those before keep their ids."""
CUT = "\ufffd"
"""What a tokenizer shows of a character whose bytes are not all there."""


class TranslatedDraft:
    """Lets ``draft``, which speaks ``draft_tokenizer``'s ids, propose for a target that speaks ``tokenizer``'s.

    Both are transformers tokenizers. Proposals are certain (one-hot): the target may sample, the draft is asked for its
    likeliest text. Rows whose last character isn't complete, or whose text doesn't split at the row's end as its tokens
    do, get no proposal.
    """

    label = "draft, translated"

    def __init__(self, draft: Any, draft_tokenizer: Any, tokenizer: Any) -> None:
        self.draft = draft
        self._target, self._source = _Vocabulary(tokenizer), _Vocabulary(draft_tokenizer)
        self._seen: list[_Row] = []

    def begin(self, cache: KVCache) -> None:
        begin(self.draft, cache)

    def warm_up(self, batch: int, *, greedy: bool) -> None:
        warm_up(self.draft, batch, greedy=True)

    def read(self, rows: Sequence[Sequence[int]]) -> None:
        self._seen = synced(self._seen, rows, lambda: _Row(self._target, self._source))
        read(self.draft, [row.source or self._source.start or [0] for row in self._seen])

    def propose(self, rows: Sequence[Sequence[int]], k: int) -> list[list[int]]:
        """Up to ``k`` of the target's tokens for each row (its real tokens so far)."""
        self._seen = synced(self._seen, rows, lambda: _Row(self._target, self._source))
        if not any(row.source for row in self._seen):
            return [[] for _ in rows]
        known = [row.source or self._source.start or [0] for row in self._seen]
        drafted = ask(self.draft, Request(known, k)).tokens.tolist()
        return [
            row.translated(list(takewhile(lambda token: token != NONE, new)))[:k]
            for row, new in zip(self._seen, drafted, strict=True)
        ]


class _Vocabulary:
    """A tokenizer as what is needed of it: text to ids and back, nothing added and nothing tidied up."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos: int | None = getattr(tokenizer, "eos_token_id", None)
        bos = getattr(tokenizer, "bos_token_id", None)
        self.start = [bos] if bos is not None and list(tokenizer("").input_ids[:1]) == [bos] else []

    def ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def behind(self, before: Sequence[int], new: Sequence[int]) -> str | None:
        """The text of ``new`` where it follows ``before``; None where no text can tell them apart."""
        shown, both = self.text(before), self.text([*before, *new])
        return both[len(shown) :] if both.startswith(shown) else None


class _Row:
    """A row in the target's ids, as text, and in the draft's ids."""

    def __init__(self, target: _Vocabulary, source: _Vocabulary) -> None:
        self.tokens: list[int] = []
        self._target, self._source = target, source
        self._read = 0  # how many of the tokens are in the text
        self._fixed = list(source.start)  # the draft's ids that stay
        self._tail = ""  # the text behind those
        self._longest = 2 * TAIL
        self.source: list[int] = []  # all of the draft's ids

    @property
    def complete(self) -> bool:
        return self._read == len(self.tokens)

    def extend(self, new: list[int]) -> None:
        self.tokens += new
        if self._read == 0 and self.tokens[: len(self._target.start)] == self._target.start:
            self._read = len(self._target.start)
        self._tail += self._complete_text()
        tail = self._source.ids(self._tail)
        if len(self._tail) > self._longest:
            if self._shorten(tail):
                tail, self._longest = self._source.ids(self._tail), 2 * TAIL
            else:
                self._longest = 2 * len(
                    self._tail
                )  # a tokenizer whose text can't be cut anywhere is not asked each time
        self.source = self._fixed + tail

    def _complete_text(self) -> str:
        """Read on to the last complete character; bytes that are none are read as they show."""
        before = self.tokens[max(0, self._read - CONTEXT) : self._read]
        pending = self.tokens[self._read :]
        for end in range(len(pending), max(-1, len(pending) - 4), -1):  # a character has no more than four bytes
            text = self._target.behind(before, pending[:end])
            if text is not None and not text.endswith(CUT):
                self._read += end
                return text
        if len(pending) < 4:
            return ""
        self._read = len(self.tokens)
        return self._target.text(pending)

    def _shorten(self, tail: list[int]) -> bool:
        """Fix the ids of the older part of the text, cut at a line or a word where both parts keep their ids."""
        for mark in ("\n", " "):
            for at in _places(self._tail, mark, len(self._tail) - TAIL):
                first = self._source.ids(self._tail[:at])
                if first + self._source.ids(self._tail[at:]) == tail:
                    self._fixed += first
                    self._tail = self._tail[at:]
                    return True
        return False

    def translated(self, drafted: list[int]) -> list[int]:
        """The target's ids of what the draft goes on with; none where they don't begin at the row's end."""
        if not self.complete or not drafted:
            return []
        ends = self._source.eos in drafted
        words = drafted[: drafted.index(self._source.eos)] if ends else drafted  # type: ignore[arg-type]
        text = self._source.behind(self.source[-CONTEXT:], words)
        if text is None:
            return []
        new = self._aligned(text.rstrip(CUT)) if text.rstrip(CUT) else []
        finished = ends and self._target.eos is not None and not text.endswith(CUT) and (new or not text)
        return [*new, self._target.eos] if finished else new  # type: ignore[list-item]

    def _aligned(self, text: str) -> list[int]:
        for count in range(min(CONTEXT, len(self.tokens)), 0, -1):
            before = self.tokens[-count:]
            ids = self._target.ids(self._target.text(before) + text)
            if ids[:count] == before:
                return ids[count:]
        return []


def _places(text: str, mark: str, until: int, most: int = 4) -> list[int]:
    """The last few places before ``until`` where ``mark`` begins."""
    found: list[int] = []
    at = until
    while len(found) < most and (at := text.rfind(mark, 0, at)) > 0:
        found.append(at)
    return found
