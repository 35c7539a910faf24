"""``qpass.search``: a scheme for each linear, by what it costs the model's output and what it saves, within a budget."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.cpu import detect
from qpass.errors import OptionError, QpassError
from qpass.frontends import progress
from qpass.frontends.batches import read_batches
from qpass.frontends.instrument import Shared
from qpass.frontends.recipe import Choice, Recipe, read_json, write_json
from qpass.frontends.simulate import Simulation, divergence, logits_of
from qpass.frontends.statistics import Statistics
from qpass.measure.linear import format_of
from qpass.measure.token_times import token_seconds
from qpass.scheme import Scheme

CANDIDATES = ("w16a16", "w8a8-dynamic", "w8a16", "w4a16-g32", "w4a16-g64", "w4a16-g128", "w4a8-g64", "w3a16-g64")
"""What each layer may get, by default."""

_FORMAT = "qpass measurements 1"
_BUDGET = re.compile(r"\s*(ppl|bytes)\s*<=\s*(\d+(?:\.\d+)?)\s*%\s*")
_ROUNDS = 8  # of bisection on what all choices together cost
_UNITS = 1 << 15  # in which the bytes above the least are counted; rounding up loses at most one an input


@dataclass(frozen=True)
class Budget:
    """``ppl``: perplexity may grow by this share, and time is saved; ``bytes``: weights may take this share of 16 bits, and quality is saved."""

    kind: str
    share: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        match = _BUDGET.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise OptionError(f"a budget is 'ppl<=1%' or 'bytes<=30%', with any number, not {text!r}")
        return cls(match[1], float(match[2]) / 100)


@dataclass(frozen=True)
class Option:
    """One scheme for one input's linears: bytes of weights, seconds a token, and KL of the output with nothing else quantized."""

    scheme: Scheme
    bytes: int
    seconds: float
    kl: float


def search(
    model: nn.Module,
    batches: Any,
    budget: str = "ppl<=1%",
    *,
    candidates: Sequence[str] = CANDIDATES,
    stats: Statistics | str | Path | None = None,
    alpha: Any = "auto",
    tokenizer: Any = None,
    resume: str | Path | None = None,
    samples: int = 8,
    length: int = 128,
    seed: int = 0,
) -> Recipe:
    """The fastest recipe within ``ppl<=..%``, or the best within ``bytes<=..%`` of the linears' 16-bit bytes.

    Each input's linears are simulated in each candidate scheme alone, and the KL of the model's output is measured (in
    nats a token, which is about the growth of log perplexity). For ``bytes`` the choices with the least sum that fits are found
    by dynamic programming. For ``ppl`` they follow the convex hull of time against KL, which for a sum of separate choices is
    the knapsack's answer to within one step; what all of them cost together is measured, and bisected upon. A token's time in each
    shape and scheme is measured once on this machine and kept, so that a search gives the same recipe twice.

    batches   as for ``qpass.calibrate``; a few hundred tokens are enough, each is run candidates x inputs times
    stats     what ``qpass.calibrate`` saw: int8 activations are then smoothed
    resume    a file that keeps each measurement as it is made, and is read if it is there and of the same question

    Raises OptionError for a budget that no choice meets, and for what can't be read.
    """
    asked = Budget.parse(budget)
    schemes = [Scheme.parse(name) for name in candidates]
    if not any(scheme.quantizes for scheme in schemes):
        raise OptionError("candidates need at least one scheme that quantizes")
    calibrated = None
    if stats is not None:
        found = Statistics.read(stats)
        found.check_model(model)
        calibrated = found.calibrated(alpha)
    elif (needy := next((s for s in schemes if s.needs_statistics), None)) is not None:
        raise OptionError(f"candidate {needy} needs statistics: pass stats=qpass.calibrate(model, batches)")
    data = _batches(model, batches, tokenizer, length, samples, seed)
    simulation = Simulation(model, calibrated)
    question = _question(data, budget="", stats=stats is not None, alpha=repr(alpha))
    notes = _Notes(None if resume is None else Path(resume), question)
    reference = [logits_of(simulation(batch)) for batch in data]
    if not all(bool(torch.isfinite(r).all()) for r in reference):
        raise QpassError("the model's own output holds NaN or infinity on these batches")

    def measure(chosen: dict[str, Scheme]) -> float:
        key = hashlib.sha256(repr(sorted((n, s.name) for n, s in chosen.items())).encode()).hexdigest()[:24]
        if key not in notes.kl:
            simulation.schemes = chosen
            each = [divergence(r, logits_of(simulation(b))) for r, b in zip(reference, data, strict=True)]
            notes.add(key, sum(each) / len(each))
        return notes.kl[key]

    inputs = dict(simulation.inputs)
    if not inputs:
        raise OptionError("the model has no linear layer over a Parameter")
    table: dict[tuple[str, ...], list[Option]] = {}
    with progress.counting("measuring sites", len(inputs)) as show:
        for done, (names, shared) in enumerate(inputs.items()):
            show(done, names[0])
            seconds = token_seconds(*_shape(shared), schemes, detect(), _element(shared))
            table[names] = [
                Option(
                    scheme,
                    _bytes(shared, scheme),
                    seconds[scheme.name],
                    measure(dict.fromkeys(names, scheme)) if scheme.quantizes else 0.0,
                )
                for scheme in schemes
            ]
    full = sum(_bytes(shared, Scheme.parse("w16a16")) for shared in inputs.values())
    with progress.waiting("choosing"):
        if asked.kind == "bytes":
            chosen, together = _within_bytes(asked, table, full, measure)
        else:
            chosen, together = _within_ppl(asked, list(_path(table)), measure)
    return _recipe(chosen, together, table, full, budget, seed)


def _batches(model: nn.Module, batches: Any, tokenizer: Any, length: int, samples: int, seed: int) -> list[Any]:
    if isinstance(batches, Iterable) and not isinstance(batches, str | Path | Tensor):
        found = list(batches)
        if not found:
            raise OptionError("the batches are empty")
        if any(isinstance(item, str) for item in found):
            found = list(read_batches(found, tokenizer, length=length, count=None))
        return found
    found = list(read_batches(batches, tokenizer, length=length, count=None))
    return random.Random(seed).sample(found, min(samples, len(found)))


def _question(data: list[Any], **more: Any) -> str:
    """A fingerprint of what is measured on what."""
    digest = hashlib.sha256(repr(sorted(more.items())).encode())
    for batch in data:
        values = (
            batch.items()
            if hasattr(batch, "items")
            else enumerate(batch if isinstance(batch, list | tuple) else [batch])
        )
        for name, value in values:
            digest.update(str(name).encode())
            digest.update(value.float().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()


class _Notes:
    """What was measured so far, kept in a file if there is one to keep it in."""

    def __init__(self, path: Path | None, question: str) -> None:
        self.path, self.question = path, question
        self.kl: dict[str, float] = {}
        if path is not None and path.is_file():
            data = read_json(path, _FORMAT, "file of measurements")
            if data.get("question") != question:
                raise OptionError(f"{path} keeps measurements of other batches or statistics: remove it to begin anew")
            self.kl = {str(key): float(value) for key, value in data["kl"].items()}

    def add(self, key: str, value: float) -> None:
        self.kl[key] = value
        if self.path is not None:
            write_json(self.path, {"format": _FORMAT, "question": self.question, "kl": self.kl})


def _shape(shared: Shared) -> tuple[int, int]:
    """Outputs of all linears that read the input, and inputs."""
    return sum(reader.ref.shape[0] for reader in shared.readers), shared.readers[0].ref.shape[1]


def _element(shared: Shared) -> int:
    return shared.readers[0].ref.parameter.element_size()


def _bytes(shared: Shared, scheme: Scheme) -> int:
    n, k = _shape(shared)
    return n * k * _element(shared) if scheme.weight is None else format_of(scheme).packed_bytes(n, k)


Table = dict[tuple[str, ...], list[Option]]
State = dict[tuple[str, ...], Option]


def _path(table: Table) -> Iterable[State]:
    """From the best quality to the least cost, one input's step at a time: always the one that saves most per KL."""
    state: State = {}
    steps: list[tuple[float, tuple[str, ...], int, Option]] = []
    for names, options in table.items():
        hull = _hull(options)
        state[names] = hull[0]
        for index, (a, b) in enumerate(pairwise(hull)):
            steps.append((_price(a, b), names, index, b))
    yield dict(state)
    for _, names, _, option in sorted(steps, key=lambda step: (step[0], step[1], step[2])):
        state[names] = option
        yield dict(state)


def _hull(options: list[Option]) -> list[Option]:
    """Those that no mix of others beats, by falling time and rising KL."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.kl, o.seconds, o.scheme.name)):
        if hull and option.seconds >= hull[-1].seconds:
            continue
        while len(hull) > 1 and _price(hull[-1], option) <= _price(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _price(a: Option, b: Option) -> float:
    return (b.kl - a.kl) / (a.seconds - b.seconds)


def _schemes(state: State) -> dict[str, Scheme]:
    return {name: option.scheme for names, option in state.items() for name in names if option.scheme.quantizes}


Measure = Callable[[dict[str, Scheme]], float]


def _within_bytes(budget: Budget, table: Table, full: int, measure: Measure) -> tuple[State, float]:
    """The least sum of KL that fits: a knapsack with one choice an input, solved exactly but for bytes that are counted in units."""
    limit = int(budget.share * full)
    least = sum(min(option.bytes for option in options) for options in table.values())
    if least > limit:
        raise OptionError(
            f"no choice takes bytes<={budget.share:.1%}: the least that the candidates allow is {least / full:.1%}"
        )
    unit = max(1, (limit - least) // _UNITS)  # of what the least choice leaves
    room = (limit - least) // unit
    best, taken = torch.zeros(room + 1, dtype=torch.float64), []
    for options in table.values():
        base = min(option.bytes for option in options)
        sums = torch.full((len(options), room + 1), math.inf, dtype=torch.float64)
        for row, option in zip(sums, options, strict=True):
            more = -(-(option.bytes - base) // unit)
            if more <= room:
                row[more:] = best[: room + 1 - more] + option.kl
        best, choice = sums.min(dim=0)
        taken.append((base, choice))
    state: State = {}
    for (names, options), (base, choice) in reversed(list(zip(table.items(), taken, strict=True))):
        option = options[int(choice[room])]
        state[names], room = option, room - -(-(option.bytes - base) // unit)
    state = {names: state[names] for names in table}
    return state, measure(_schemes(state))


def _within_ppl(budget: Budget, path: list[State], measure: Measure) -> tuple[State, float]:
    """The furthest state of the path whose measured KL stays within; KL rises along the path but for noise."""
    most = math.log1p(budget.share)
    first = measure(_schemes(path[0]))
    if first > most:
        raise OptionError(
            f"no choice keeps ppl<={budget.share:.1%}: the best that the candidates allow costs {math.expm1(first):.2%}"
        )
    low, high = 0, len(path)  # the first is within, the second is not (or is none)
    for _ in range(_ROUNDS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        if measure(_schemes(path[middle])) <= most:
            low = middle
        else:
            high = middle
    return path[low], measure(_schemes(path[low]))


def _recipe(chosen: State, together: float, table: Table, full: int, budget: str, seed: int) -> Recipe:
    choices = []
    for names, option in chosen.items():
        cheaper = [o for o in table[names] if o.bytes < option.bytes]
        reason = "the least there is"
        if cheaper:
            nearest = min(cheaper, key=lambda o: o.kl)
            times = nearest.kl / option.kl if option.kl > 0 else math.inf
            reason = f"{nearest.scheme} would cost {nearest.kl:.2e}" + (
                f", {times:.1f} times" if times < math.inf else ""
            )
        choices.append(Choice(names, option.scheme.name, option.bytes, 1e6 * option.seconds, option.kl, reason))
    size = sum(c.bytes for c in choices)
    summary = {
        "budget": budget,
        "seed": seed,
        "bytes": size,
        "share of 16 bits": f"{size / full:.1%}",
        "us a token": round(sum(c.microseconds for c in choices), 1),
        "KL together": together,
        "perplexity, about": f"+{math.expm1(together):.2%}",
    }
    return Recipe(tuple(choices), summary)
