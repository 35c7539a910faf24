"""Guesses of a draft that is switched off, settled by the tokens that come."""

from qpass.runtime.ngram import NgramDraft
from qpass.runtime.shadow import Shadow


class Fixed:
    free = True

    def __init__(self, guesses):
        self.guesses, self.calls = guesses, 0

    def propose(self, rows, k):
        self.calls += 1
        return [guess[:k] for guess in self.guesses]


def test_a_guess_is_settled_by_its_first_wrong_token_or_its_end():
    rows = [[1, 2], [1, 2], [1, 2]]
    shadow = Shadow(Fixed([[3, 4, 5, 6], [3, 9], []]))
    shadow.guess(rows, [True] * 3)
    assert shadow.settled(rows) == ([0], [0])  # no guess is settled at once
    for token, expected in ((3, ([], [])), (4, ([2], [1])), (5, ([], [])), (6, ([4], [4]))):
        rows = [[*row, token] for row in rows]
        assert shadow.settled(rows) == expected


def test_one_guess_a_row_and_none_for_rows_that_have_ended():
    draft = Fixed([[3, 4], [3, 4]])
    shadow = Shadow(draft)
    for _ in range(2):
        shadow.guess([[1], [1]], [True, False])
    assert draft.calls == 1
    assert shadow.settled([[1, 9], [1, 9]]) == ([2], [0])
    shadow.guess([[1, 9], [1, 9]], [True, False])
    shadow.forget()
    assert shadow.settled([[1, 9, 9], [1, 9]]) == ([], [])


def test_only_a_draft_that_costs_nothing_is_asked():
    draft = Fixed([[3]])
    draft.free = False
    Shadow(draft).guess([[1]], [True])
    Shadow(None).guess([[1]], [True])
    assert draft.calls == 0
    assert NgramDraft.free
