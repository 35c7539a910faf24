"""What a draft remembers of each row, found again in the next round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class Remembered(Protocol):
    tokens: list[int]  # the row as it was when it was last seen

    def extend(self, new: list[int]) -> None: ...


T = TypeVar("T", bound=Remembered)


def synced(known: Sequence[T], rows: Sequence[Sequence[int]], begin: Callable[[], T]) -> list[T]:
    """The memory of each row, extended to it; one that no known row begins (cut back, another text) begins anew.

    Rows may have changed places, because others have ended.
    """
    free, found = list(known), []
    for row in rows:
        row = row if isinstance(row, list) else list(row)
        mine = next((each for each in free if row[: len(each.tokens)] == each.tokens), None)
        if mine is None:
            mine = begin()
        else:
            free.remove(mine)
        mine.extend(row[len(mine.tokens) :])
        found.append(mine)
    return found
