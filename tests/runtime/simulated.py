"""A draft and a target that exist only as numbers: costs, acceptance, noise; and a controller that runs against them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from qpass.runtime.shadow import GUESS


@dataclass
class World:
    """``accepts(tokens so far, position)`` is the chance of a draft; ``proposes(tokens)`` that there is one at all.

    Costs in ms: a plain step, a drafted token, and a verification of k as a multiple of a plain step.
    ``first_ms``: what the first draft takes more (it reads the prompt). ``noise`` is relative, one time in ``outliers``
    is ten times as long.
    """

    accepts: Callable[[int, int], float]
    draft_ms: float = 11.0
    plain_ms: float = 36.0
    verify: Callable[[int], float] = lambda k: 1 + 0.013 * k
    proposes: Callable[[int], float] = lambda tokens: 1.0
    first_ms: float = 0.0
    noise: float = 0.0
    outliers: int = 0
    rows: int = 1
    seed: int = 0
    free: bool = False  # the draft is judged while it is switched off, too
    adaptive: bool = False  # the draft knows its chances, and asks the controller before each further token
    log: list[int] = field(default_factory=list)

    def run(self, controller, tokens: int) -> float:
        """The true ms, without noise, until every row has ``tokens`` tokens."""
        chance = random.Random(self.seed)
        rows, spent, first = [0] * self.rows, 0.0, self.first_ms
        guess: tuple[int, int, int] | None = None  # the token that settles it, its length, what of it is right
        while rows:
            k = controller.choose()
            self.log.append(k)
            drafted, accepted, sure = [], [], []
            for row in rows:
                width = k if chance.random() < self.proposes(row) else 0
                chances: list[float] = []
                while len(chances) < width:
                    if self.adaptive and not controller.go_on(chances):
                        break
                    p = self.accepts(row + len(chances), len(chances) + 1)
                    if self.adaptive:  # sure of some tokens, unsure of others, the same chance on the whole
                        p = 0.98 if chance.random() < (p - 0.2) / 0.78 else 0.2
                    chances.append(p)
                kept = 0
                while kept < len(chances) and chance.random() < chances[kept]:
                    kept += 1
                drafted.append(len(chances))
                accepted.append(kept)
                sure.append(chances)
            draft = self.draft_ms * max(drafted) + (first if k else 0.0)
            verify = self.plain_ms * (self.verify(max(drafted)) if max(drafted) else 1.0)
            first = 0.0 if k else first
            spent += draft + verify
            if self.free and not controller.on and guess is None:
                width = GUESS if chance.random() < self.proposes(rows[0]) else 0
                right = next((i for i in range(width) if chance.random() >= self.accepts(rows[0] + i, i + 1)), width)
                guess = (rows[0] + max(1, min(right + 1, width)), width, right)
            if guess is not None and rows[0] + 1 >= guess[0]:
                controller.overhear(GUESS, [guess[1]], [guess[2]])
                guess = None
            controller.observe(
                k,
                drafted,
                accepted,
                draft * self._disturbed(chance),
                verify * self._disturbed(chance),
                sure if self.adaptive else None,
            )
            rows = [row + kept + 1 for row, kept in zip(rows, accepted, strict=True)]
            rows = [row for row in rows if row < tokens]
        return spent

    def _disturbed(self, chance: random.Random) -> float:
        factor = max(0.3, chance.gauss(1, self.noise)) if self.noise else 1.0
        return 10 * factor if self.outliers and chance.random() < 1 / self.outliers else factor
