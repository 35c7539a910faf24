"""A draft that costs nothing is judged while it is switched off: its guesses are compared with what comes anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GUESS = 4
"""Tokens of a guess: as long as drafts in use often are, and settled within as many steps."""


class Shadow:
    """Keeps at most one guess a row, from when it was made until the row's own tokens have settled it.

    A draft says ``free = True`` where proposing takes microseconds; of any other nothing is asked here.
    """

    def __init__(self, draft: Any) -> None:
        self._draft = draft if getattr(draft, "free", False) else None
        self._open: dict[int, tuple[int, list[int]]] = {}  # row -> the place that its guess begins at, and the guess

    def guess(self, rows: Sequence[Sequence[int]], running: Sequence[bool]) -> None:
        """Have the draft guess on, for running rows without an open guess."""
        due = [b for b, runs in enumerate(running) if runs and b not in self._open]
        if self._draft is None or not due:
            return
        guesses = self._draft.propose(rows, GUESS)
        self._open |= {b: (len(rows[b]), list(guesses[b])) for b in due}

    def settled(self, rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Of each guess that the rows have settled: how many tokens it had, and how many of them were right."""
        drafted, accepted = [], []
        for b, (place, guess) in list(self._open.items()):
            came = rows[b][place:]
            right = next((i for i, (a, g) in enumerate(zip(came, guess, strict=False)) if a != g), None)
            if right is None and len(came) < len(guess):
                continue  # all right so far
            drafted.append(len(guess))
            accepted.append(len(guess) if right is None else right)
            del self._open[b]
        return drafted, accepted

    def forget(self) -> None:
        self._open.clear()
