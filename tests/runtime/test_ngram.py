"""What the lookup proposes, against a search by hand, and that its index follows the rows."""

import random
import time

import pytest

from qpass.errors import OptionError
from qpass.runtime.ngram import NgramDraft


def by_search(row: list[int], k: int, longest: int, shortest: int) -> list[int]:
    for n in range(longest, shortest - 1, -1):
        for end in range(len(row) - 1, n - 1, -1):
            if row[end - n : end] == row[-n:]:
                text = [*row]
                for i in range(k):
                    text.append(text[end + i])
                return text[len(row) :]
    return []


def test_the_longest_suffix_wins_then_the_latest_place():
    draft = NgramDraft()
    assert draft.propose([[1, 2, 3, 9, 2, 3, 7, 5, 1, 2, 3]], 2) == [[9, 2]]
    assert draft.propose([[2, 3, 9, 2, 3, 7, 5, 2, 3]], 2) == [[7, 5]]


def test_without_a_match_nothing_is_proposed():
    draft = NgramDraft()
    assert draft.propose([[1, 2, 3, 4], [], [5]], 4) == [[], [], []]
    assert NgramDraft(shortest=2).propose([[1, 2, 3, 1]], 4) == [[]]
    assert NgramDraft().propose([[1, 2, 3, 1]], 0) == [[]]


def test_a_repetition_goes_on():
    assert NgramDraft().propose([[8, 1, 2, 1, 2, 1]], 5) == [[2, 1, 2, 1, 2]]
    assert NgramDraft().propose([(4, 4)], 3) == [[4, 4, 4]]


@pytest.mark.parametrize(("longest", "shortest"), [(4, 1), (3, 2), (1, 1)])
def test_growing_rows_are_searched_as_by_hand(longest, shortest):
    """Rows that grow by several tokens, end, change places, are cut back, and are replaced."""
    chance = random.Random(0)
    draft = NgramDraft(longest, shortest)
    rows = [[chance.randrange(4) for _ in range(n)] for n in (0, 3, 30)]
    for step in range(200):
        assert draft.propose(rows, 5) == [by_search(row, 5, longest, shortest) for row in rows]
        for row in rows:
            row += [chance.randrange(4) for _ in range(chance.randrange(4))]
        if step % 20 == 7:
            rows.append([chance.randrange(4) for _ in range(8)])
        if step % 20 == 13:
            rows.pop(chance.randrange(len(rows)))
        if step % 20 == 17:
            del rows[-1][len(rows[-1]) // 2 :]
        if step % 20 == 19:
            chance.shuffle(rows)


def test_rows_that_are_equal_have_an_index_each():
    draft = NgramDraft()
    draft.propose([[1, 2, 1], [1, 2, 1]], 2)
    assert draft.propose([[1, 2, 1, 3, 1], [1, 2, 1, 5, 1]], 1) == [[3], [5]]


def test_a_call_costs_no_search():
    """At 1000 and at 8000 tokens: bounded far above what it takes, far below what a search from the start would."""
    for length in (1000, 8000):
        chance = random.Random(1)
        row = [chance.randrange(150_000) for _ in range(length // 2)] * 2
        draft = NgramDraft()
        draft.propose([row], 7)
        times = []
        for _ in range(50):
            row += [chance.randrange(150_000) for _ in range(3)]
            started = time.perf_counter()
            draft.propose([row], 7)
            times.append(time.perf_counter() - started)
        assert min(times) < 5e-4


def test_lengths_are_checked():
    with pytest.raises(OptionError, match="n-grams of 3 to 2 tokens"):
        NgramDraft(2, 3)
