"""What a speculative generation did: tokens a step, what each part cost, and how near it came to its own bound."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from qpass.runtime.control import Round, Switch


@dataclass(frozen=True)
class Piece:
    """One new token of a row: whether it was drafted, and the drafted tokens that it took the place of."""

    token: int
    drafted: bool
    rejected: tuple[int, ...] = ()
    by: str | None = None  # which draft


@dataclass
class Stats:
    """Times are wall clock, in milliseconds; ``pieces`` holds a list a row."""

    rounds: list[Round] = field(default_factory=list)
    switches: list[Switch] = field(default_factory=list)  # where speculation switched itself off and on
    ttft_ms: float = float("nan")
    read_ms: float = 0.0  # what the draft took for the prompt, behind the first token
    pieces: list[list[Piece]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)  # each round after the first token, everything included
    step_tokens: list[int] = field(default_factory=list)  # of all rows
    step_longest: list[int] = field(default_factory=list)  # of the row that got most

    def emitted(
        self,
        new: Sequence[Sequence[int]],
        accepted: Sequence[int],
        rejected: Sequence[Sequence[int]],
        by: Sequence[str],
    ) -> None:
        """Note the new tokens of each row: the first ``accepted`` were drafted, ``rejected`` were not taken."""
        if not self.pieces:
            self.pieces = [[] for _ in new]
        for row, tokens, n, refused, who in zip(self.pieces, new, accepted, rejected, by, strict=True):
            for i, token in enumerate(tokens):
                row.append(Piece(token, True, (), who) if i < n else Piece(token, False, tuple(refused)))

    @property
    def new_tokens(self) -> int:
        return sum(map(len, self.pieces))

    @property
    def tokens_a_step(self) -> float:
        """New tokens of a row in one forward of the target; 1 is plain decoding."""
        rows = sum(len(each.accepted) for each in self.rounds)
        return 1 + sum(sum(each.accepted) for each in self.rounds) / rows if rows else float("nan")

    @property
    def acceptance(self) -> float:
        """The share of the drafted tokens that was accepted."""
        drafted = sum(sum(each.drafted) for each in self.rounds)
        return sum(sum(each.accepted) for each in self.rounds) / drafted if drafted else float("nan")

    @property
    def tpot_ms(self) -> float:
        """Time over tokens of the longest row, after its first: what one reader waits for a token on average."""
        tokens = max(map(len, self.pieces), default=0) - 1
        return (self.read_ms + sum(self.step_ms)) / tokens if tokens > 0 else float("nan")

    @property
    def token_ms(self) -> list[float]:
        """Each token's share of its round, those of the row that got most: rows of a batch wait together."""
        return [ms / n for ms, n in zip(self.step_ms, self.step_longest, strict=True) for _ in range(n)]

    @property
    def tokens_per_second(self) -> float:
        """Of all rows, after the first token."""
        return 1e3 * sum(self.step_tokens) / sum(self.step_ms) if self.step_ms else float("nan")

    @property
    def draft_share(self) -> float:
        """The share of the time that the draft took."""
        return sum(each.draft_ms for each in self.rounds) / sum(self.step_ms) if self.step_ms else float("nan")

    @property
    def loop_share(self) -> float:
        """The share of the time that neither draft nor target took: Python, lists, statistics."""
        spent = sum(each.draft_ms + each.verify_ms for each in self.rounds)
        return 1 - spent / sum(self.step_ms) if self.step_ms else float("nan")

    @property
    def verify_ms(self) -> dict[int, float]:
        """The median time of the target's forward by the number of drafted tokens that it checked; 0: a plain step."""
        times: dict[int, list[float]] = defaultdict(list)
        for each in self.rounds:
            times[max(each.drafted, default=0)].append(each.verify_ms)
        return {k: statistics.median(values) for k, values in sorted(times.items())}

    @property
    def bound_ms(self) -> float:
        """The least time a token for what was accepted, (c_verify + K c_draft) / (accepted + 1) with median costs."""
        drafts: dict[int, list[float]] = defaultdict(list)
        for each in self.rounds:
            drafts[max(each.drafted, default=0)].append(each.draft_ms)
        verify = self.verify_ms
        draft = {k: statistics.median(values) for k, values in drafts.items()}
        tokens = max(map(len, self.pieces), default=0) - 1
        spent = sum(verify[k] + draft[k] for k in (max(each.drafted, default=0) for each in self.rounds))
        return spent / tokens if tokens > 0 else float("nan")

    def table(self) -> list[tuple[str, str]]:
        """Names and values, as ``print(stats)`` shows them."""
        asked = [each.asked for each in self.rounds]
        costs = ", ".join(f"K={k} {ms:.1f} ms" for k, ms in self.verify_ms.items())
        return [
            ("new tokens", f"{self.new_tokens} in {len(self.rounds) + 1} steps, {self.tokens_a_step:.2f} a step"),
            ("speed", f"{self.tokens_per_second:.1f} tokens/s, TPOT {self.tpot_ms:.1f} ms, TTFT {self.ttft_ms:.0f} ms"),
            ("accepted", f"{self.acceptance:.0%} of the drafted tokens" if any(asked) else "nothing was drafted"),
            ("verify", costs or "none"),
            ("draft", f"{self.draft_share:.0%} of the time; {self.read_ms:.0f} ms for the prompt"),
            (
                "loop",
                f"{self.loop_share:.1%} of the time; the bound for this acceptance is {self.bound_ms:.1f} ms a token",
            ),
            ("K", _runs(asked)),
            ("switched", ", ".join(f"{'on' if s.on else 'off'} at step {s.at}" for s in self.switches) or "never"),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:10}  {value}" for name, value in self.table())


def _runs(values: Sequence[int]) -> str:
    """4 4 4 5 0 0 as "4 x3, 5, 0 x2", the middle left out where it is long."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    words = [f"{value} x{n}" if n > 1 else str(value) for value, n in runs]
    return ", ".join(words if len(words) <= 12 else [*words[:6], "...", *words[-5:]]) or "none"
