"""How many tokens to draft: the controller learns costs and acceptance online, and stops speculating while it loses.

Plain arithmetic on the times and counts that it is told; no clock, no randomness, no torch. The expected tokens of a
round with K drafts over its expected time is a rate; the K of the best rate is taken. All times are milliseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qpass.errors import OptionError
from qpass.runtime.learned import LATEST, Calibration, Chances, Times, trimmed, typical

START, PROBE = 2, 2
"""Drafts of the first rounds, and of a probe: a refused round of two costs half of one of four."""
SHARE = 0.015
"""Of all time, what speculation may have lost altogether before it pauses; probing waits until it lies below this."""
ALLOWANCE = 3.0
"""Plain steps that may be lost on top of SHARE before speculation pauses: what finding out takes at the beginning."""
SURE = 1.15
"""With more lost than that, speculation goes on only if it is to gain this much."""
CREDIT = 4.0
"""Plain steps of what was won before that count against a later loss: a turn in the text is judged by the text behind it."""
BETTER = 1.02
"""A change of K, or switching on, wants a rate that is this much better: less is noise."""
GROWTH = 2
"""The most that K grows by in a round: costs and chances are known near what was tried."""
REFRESH, CLOSE = 32, 1.25
"""A plain step is timed again after so many rounds where speculation is less than this much faster than it."""
PROBES = 1.0
"""Plain steps on top of SHARE that a probe may lose: less than ALLOWANCE, so that most of the allowance ends a try."""
WAIT, LONGEST_WAIT = 8.0, 64.0
"""Rounds from a failed probe to the next: the first wait, growing by half each time, up to the longest."""


@dataclass(frozen=True)
class Round:
    """One round as it was observed; ``asked`` 0 is a plain step. ``drafted`` and ``accepted`` hold a number a row."""

    asked: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    draft_ms: float
    verify_ms: float


@dataclass(frozen=True)
class Switch:
    """Speculation went on or off before round number ``at`` of the history."""

    at: int
    on: bool


class Controller:
    """Chooses K for each round; rows of a batch share it, and advance independently.

    ``k`` "auto" learns, from 0 to ``most``; a number is always that number. ``history`` holds every round, ``switches``
    when speculation switched itself off and on. Costs that were learned stay for the next text.
    """

    def __init__(self, k: int | Literal["auto"] = "auto", most: int = 15) -> None:
        if k != "auto" and (isinstance(k, bool) or not isinstance(k, int) or k < 0):
            raise OptionError(f"k is {k!r}; accepted: 'auto' or a whole number >= 0")
        if most < 0:
            raise OptionError(f"the most tokens to draft are {most}; accepted: a whole number >= 0")
        self.fixed = None if k == "auto" else k
        self.most = most if self.fixed is None else self.fixed
        self.history: list[Round] = []
        self.switches: list[Switch] = []
        self.on = self.most > 0
        self._plain: deque[float] = deque(maxlen=LATEST)
        self._plain_age = 0  # rounds since a plain step was timed
        self._draft, self._verify = Times(trimmed), Times(typical)
        self._accepts = Chances(prior=0.6, weight=8.0, pooled_from=1)  # position i, drafted and reached
        self._drafts = Chances(prior=1.0, weight=0.5, pooled_from=2)  # a row drafts position i, where it is reached
        self._widths = Chances(prior=1.0, weight=0.5, pooled_from=2)  # the widest row drafts position i
        self._calibration = Calibration()
        self._rows = 0
        self._k = START  # the latest choice above 0
        self._lost = 0.0  # plain steps that speculation has cost more than it gave
        self._total = 0.0  # plain steps that all rounds have taken
        self._wait, self._since_probe = WAIT, 0.0
        self._overheard = False  # guesses were judged since the last round
        self._rate = 0.0  # tokens a ms at the best K
        self._costs = [0.0] * (self.most + 1)  # of drafting i tokens, and their verification
        self._next = self.fixed or 0  # plain steps first: nothing can be judged without their time

    def renew(self) -> None:
        """Begin another text: the history starts anew, costs are kept, and acceptance is no more than a guess.

        What was lost over the budget is kept as well: texts that all can't be predicted share it, however short they are.
        """
        self.history, self.switches = [], []
        if self.fixed is not None or self.most == 0:
            return
        self._forget()
        self._lost, self._total = min(max(self._lost - SHARE * self._total, 0.0), ALLOWANCE), 0.0
        self.on = True  # a round at least
        if len(self._plain) > 1 and self._draft.samples():
            self._next = min(START, self._plan())

    def choose(self) -> int:
        """The number of tokens to ask the draft for in the next round; 0 is a plain step."""
        return self._next

    def go_on(self, confidences: Sequence[float]) -> bool:
        """Whether to draft one more token, given the draft's probability of each that it has drafted in this round.

        While some number of further tokens is expected to gain more than their time would at the rate reached on the whole.
        Not the next one alone: costs of single tokens are differences of times, and as noisy.
        """
        count = len(confidences)
        if self.fixed is not None or count == 0:
            return count < self.choose()
        if count >= self.choose():
            return False
        kept, gain, mean = 1.0, 0.0, self._calibration.mean()
        for confidence in confidences:
            kept *= self._calibration.chance(confidence)
        for more in range(count + 1, self.choose() + 1):
            kept *= mean
            gain += kept
            if gain > self._rate * (self._costs[more] - self._costs[count]):
                return True
        return False

    def observe(
        self,
        asked: int,
        drafted: Sequence[int],
        accepted: Sequence[int],
        draft_ms: float,
        verify_ms: float,
        confidences: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Learn from a round: what was asked for, and of each row how much it drafted and the target accepted."""
        self.history.append(Round(asked, tuple(drafted), tuple(accepted), draft_ms, verify_ms))
        if self.fixed is not None or self.most == 0 or not drafted:
            return
        self._learn_times(asked, drafted, draft_ms, verify_ms)
        if asked:
            memory = 0.95 if self.on else 0.8  # of what was known, a round; probes are few and must turn it
            self._learn_chances(asked, drafted, accepted, memory)
            self._calibration.add(confidences or (), accepted)
        best = self._plan()
        self._account(asked, drafted, accepted)
        self._next = self._decide(asked, max(drafted), accepted, best)
        if self._next:
            self._k = self._next

    def overhear(self, asked: int, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Learn from guesses that nobody verified, compared with the tokens that came: whether to switch on again."""
        if self.on or not drafted:
            return
        self._learn_chances(asked, drafted, accepted, 0.9)
        self._overheard = True

    def _learn_times(self, asked: int, drafted: Sequence[int], draft_ms: float, verify_ms: float) -> None:
        if len(drafted) != self._rows:  # another batch has other costs: what was learned is only a start
            self._rows = len(drafted)
            for times in (self._draft, self._verify):
                times.condense()
            while len(self._plain) > 1:
                self._plain.remove(max(self._plain))
        width = max(drafted)
        if asked:
            self._draft.add(width, draft_ms)
        if width:
            self._verify.add(width, verify_ms)
            self._plain_age += 1
        else:
            self._plain.append(verify_ms)
            self._plain_age = 0

    def _learn_chances(self, asked: int, drafted: Sequence[int], accepted: Sequence[int], memory: float) -> None:
        for chances in (self._accepts, self._drafts, self._widths):
            chances.fade(memory)
        for i in range(1, asked + 1):
            if max(drafted) >= i - 1:
                self._widths.add(i, max(drafted) >= i)
            for has, kept in zip(drafted, accepted, strict=True):
                if kept >= i - 1:
                    self._drafts.add(i, has >= i)
                    if has >= i:
                        self._accepts.add(i, kept >= i)

    def _plan(self) -> int:
        """Work out the rate of every K; the K > 0 of the best one, the present one where that is as good."""
        plain = self._plain_ms()
        draft = self._draft.table(self.most, 0.0)
        verify = self._verify.table(self.most, plain)
        costs = [d + v for d, v in zip(draft, verify, strict=True)]
        tokens, kept, reached, cost = 1.0, 1.0, 1.0, costs[0]
        rates = [1.0 / max(plain, 1e-9)]
        drafts, accepts, widths = (c.table(self.most) for c in (self._drafts, self._accepts, self._widths))
        for i in range(1, self.most + 1):
            kept *= drafts[i] * accepts[i]
            reached *= widths[i]
            tokens += kept
            cost += reached * (costs[i] - costs[i - 1])
            rates.append(tokens / max(cost, 1e-9))
        self._rates = rates
        allowed = min(self.most, self._k + GROWTH)
        best = max(range(1, allowed + 1), key=rates.__getitem__)
        if self._k <= allowed and rates[best] < BETTER * rates[self._k]:
            best = self._k
        self._rate = max(rates[best], rates[0])
        self._costs = costs
        return best

    def _account(self, asked: int, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """What the round has cost and given, in plain steps, by the learned costs: an outlier is nobody's fault."""
        plain, width = max(self._plain_ms(), 1e-9), min(max(drafted), self.most)
        took = self._costs[width] / plain if asked else 1.0
        self._total += took
        if asked:
            given = 1 + sum(accepted) / len(accepted)
            self._lost = max(self._lost + took - given, -CREDIT)

    def _decide(self, asked: int, width: int, accepted: Sequence[int], best: int) -> int:
        if len(self._plain) < 2:
            return 0
        gain = self._rates[best] / self._rates[0]
        if self.on:
            tried = self._draft.samples()
            if tried < 2:  # the first draft of a text also reads the prompt: one round alone is no judge of its cost
                return 1 if self._lost > 2 * ALLOWANCE else min(START, self.most)
            if gain < 1 and tried < 4 and self._accepts.table(1)[1] > 0.6:  # only the times lose: are they disturbed?
                return 1
            if gain >= (1 if self._lost <= SHARE * self._total + ALLOWANCE else SURE):
                return 0 if gain < CLOSE and self._plain_age >= REFRESH else best
            self._switch(False)
            self._wait, self._since_probe = WAIT, 0.0
            return 0
        probed, overheard, self._overheard = asked > 0 and width > 0, self._overheard, False
        self._since_probe += 1
        within = self._lost <= SHARE * self._total + PROBES
        if (probed and gain >= BETTER) or (overheard and gain >= (BETTER if within else SURE)):
            self._switch(True)
            return best
        loss = self._costs[min(PROBE, self.most)] / max(self._plain_ms(), 1e-9) - 1
        if probed:
            if sum(accepted) > 0 and self._lost + loss <= SHARE * self._total + PROBES:
                return min(PROBE, self.most)
            self._wait, self._since_probe = min(1.5 * self._wait, LONGEST_WAIT), 0.0
        due = self._since_probe >= self._wait and self._lost + loss <= SHARE * self._total + PROBES
        return min(PROBE, self.most) if due else 0

    def _switch(self, on: bool) -> None:
        self.on = on
        self.switches.append(Switch(len(self.history), on))
        if not on:  # what comes back may be another text
            self._forget()

    def _forget(self) -> None:
        for chances in (self._accepts, self._drafts, self._widths):
            chances.forget(4.0)

    def _plain_ms(self) -> float:
        return typical(self._plain) if self._plain else 0.0
