"""The recipe table's numbers: TTFT, TPOT and tokens a second of several variants in turns, each beside its machine limit.

TTFT is held against the arithmetic of the prompt, TPOT against the bytes that one step must read, both with the rates
that were measured before and behind each turn.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from qpass.cpu import Rates
from qpass.measure.bench_machine import Watch
from qpass.measure.latency import turns
from qpass.measure.record import Record


@dataclass(frozen=True)
class Work:
    """What a model must do at least. Numbers are of one row; weights are read once for all rows of a batch."""

    weight_bytes: int  # all linears, read in every step
    kv_bytes: int  # of one token of context
    macs: int  # of one token in the linears that see every token
    head_macs: int  # in the head, which sees a prompt's last token
    attention_macs: int  # of one query and one key, all layers and heads
    peak: Literal["int8", "bf16"]  # the products of the linears

    def token_bytes(self, context: float, batch: int) -> float:
        """What one step reads: weights once, and each row's keys and values."""
        return self.weight_bytes + batch * context * self.kv_bytes

    def prompt_seconds(self, tokens: int, batch: int, rates: Rates) -> float:
        """The least time of a prompt by arithmetic alone; a query sees half of the prompt on average."""
        int8, bf16 = max(rates.int8_macs, rates.int8_tile_macs), max(rates.bf16_macs, rates.bf16_tile_macs)
        most = int8 if self.peak == "int8" else max(bf16, rates.int8_macs / 2)  # two int8 terms, where bf16 is slow
        linears = batch * (tokens * self.macs + self.head_macs) / most
        return linears + batch * self.attention_macs * tokens * (tokens + 1) / 2 / bf16


@dataclass(frozen=True)
class Outcome:
    """One generation of a batch. ``about``: acceptance, tokens a step, ..; of the traces the last is kept."""

    ttft_ms: float
    tpot_ms: float  # from the first token to the last, over the tokens between
    about: Mapping[str, float] = field(default_factory=dict)
    trace: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Contender:
    """``generate(ids [B, S], new)``; ``work`` is None where the least amount of work isn't known."""

    name: str
    generate: Callable[[Tensor, int], Outcome]
    work: Work | None = None
    about: Mapping[str, Any] | None = None


def measure_case(
    contenders: Sequence[Contender],
    ids: Tensor,
    new: int,
    rounds: int,
    settings: Mapping[str, Any],
    processes: Sequence[int] = (),
) -> Iterator[Record]:
    """One prompt length and batch: records ``ttft``, ``tpot`` and ``throughput`` of each contender, in turns.

    ``processes`` are those that work for the contenders, by default this one. A contender's share of its limit is the median over its turns, each by the rates around it. ``disturbed`` in the
    settings has a sentence for everything that makes the numbers doubtful.
    """
    batch, tokens = ids.shape
    watch = Watch(processes or (os.getpid(),))
    runs = {each.name: (lambda each=each: each.generate(ids, new)) for each in contenders}
    seen = turns(runs, rounds=rounds, between=watch.take)
    machine = watch.settings()
    for each in contenders:
        outcomes, rates = seen[each.name], watch.of(each.name)
        ttft, tpot = [o.ttft_ms for o in outcomes], [o.tpot_ms for o in outcomes if o.tpot_ms == o.tpot_ms]
        common = {**settings, **machine, "prompt": tokens, "batch": batch, "new": new, "variant": each.name}
        common |= dict(each.about or {})
        common |= {name: statistics.median(o.about[name] for o in outcomes) for name in outcomes[0].about}
        prompt_share = token_share = None
        if each.work is not None:
            context = tokens + new / 2
            read = each.work.token_bytes(context, batch)
            common |= {"weight_bytes": each.work.weight_bytes, "read_bytes": round(read), "peak": each.work.peak}
            prompt_share = statistics.median(
                1e3 * each.work.prompt_seconds(tokens, batch, r) / ms for r, ms in zip(rates, ttft, strict=True)
            )
            if tpot and "bound_ms" not in common:  # a draft's rounds read other bytes: its bound is its own
                token_share = statistics.median(
                    1e3 * read / r.read_bytes / ms for r, ms in zip(rates, tpot, strict=True)
                )
        yield _record("ttft", ttft, "ms", common, prompt_share, watch)
        if not tpot:
            continue
        if "bound_ms" in common:
            token_share = common["bound_ms"] / statistics.median(tpot)
        yield _record("tpot", tpot, "ms", common, token_share, watch)
        if outcomes[-1].trace is not None:
            about = {
                name: common[name] for name in (*settings, "prompt", "batch", "new", "variant", *(each.about or {}))
            }
            yield Record.of(
                "trace", [o.about["tokens_a_step"] for o in outcomes], "tokens", about | dict(outcomes[-1].trace)
            )
        yield _record("throughput", [1e3 * batch / ms for ms in tpot], "tokens/s", common, None, watch)


def _record(
    what: str, observed: Sequence[float], unit: str, settings: dict[str, Any], share: float | None, watch: Watch
) -> Record:
    record = Record.of(what, observed, unit, settings)
    disturbed = watch.disturbances(what, record.p10, record.p90)
    return replace(record, share_of_limit=share, settings={**settings, "disturbed": disturbed})
