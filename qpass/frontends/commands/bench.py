"""``qpass bench``: how fast a model is in several variants, beside the machine's limits, as Records and a table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from qpass.errors import OptionError
from qpass.frontends import progress
from qpass.frontends.commands import session
from qpass.frontends.commands.bench_variants import BASELINES, RECIPE, Calibrated, Draft, contenders


def words(option: str, text: str) -> list[str]:
    """ "a,b" as a list. Raises OptionError when there is nothing in it."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise OptionError(f"{option} is empty; give names with commas between them")
    return list(dict.fromkeys(found))


def numbers(option: str, text: str) -> list[int]:
    """ "1,4" as a list. Raises OptionError for what is no whole number."""
    for word in (found := words(option, text)):
        if not word.isdecimal():
            raise OptionError(f"{option} {word}: accepted are whole numbers with commas between them")
    return [int(word) for word in found]


@dataclass(frozen=True)
class Asked:
    """What ``qpass bench`` was asked for."""

    schemes: Sequence[str]
    prompt_len: Sequence[int]
    batch: Sequence[int]
    new: int
    rounds: int
    draft: Draft | None = None
    draft_with: Sequence[str] = ()  # the schemes that also run with the draft; none given: all but stock
    costs: bool = False
    text: Path | None = None
    calibrated: Calibrated = field(default_factory=Calibrated)

    def check(self) -> None:
        from qpass.scheme import Scheme

        for scheme in self.schemes:
            if scheme not in (*BASELINES, RECIPE):
                Scheme.parse(scheme)
        if (RECIPE in self.schemes) != (self.calibrated.recipe is not None):
            raise OptionError("a recipe needs both --recipe FILE and the name recipe among --schemes")
        for name, numbers, least in (("--prompt-len", self.prompt_len, 2), ("--batch", self.batch, 1)):
            for number in numbers:
                if number < least:
                    raise OptionError(f"{name} {number}: accepted are whole numbers from {least} on")
        if strange := set(self.draft_with) - set(self.schemes):
            raise OptionError(f"--draft-with {min(strange)} is not among --schemes {','.join(self.schemes)}")
        if self.draft_with and self.draft is None:
            raise OptionError("--draft-with says which schemes have a draft; give one with --draft")
        only = self.calibrated.only
        if strange := set(only) - {scheme for scheme in self.schemes if "a8" in scheme}:
            raise OptionError(f"--stats-with {min(strange)} is no scheme with int8 activations among --schemes")
        if only and self.calibrated.stats is None:
            raise OptionError("--stats-with says which schemes are smoothed; give statistics with --stats")
        if self.text is not None and not self.text.exists():
            raise OptionError(f"--text {self.text} does not exist; accepted: a text file or a folder of them")


def bench(model: str, asked: Asked, output: Path | None) -> None:
    """The table goes to stdout; records go to ``output`` as they come, a line each. Raises QpassError."""
    asked.check()
    session.check(model, "w16a16")
    from qpass.measure.bench_table import table
    from qpass.measure.record import Record, append

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    found: list[Record] = []
    try:
        for record in _records(model, asked):
            found.append(record)
            if output is not None:
                append(output, [record])
    finally:
        for each in table(found):
            console.print(each)


def _records(model: str, asked: Asked) -> Iterator[Any]:
    import torch

    from qpass.frontends.commands.bench_costs import measure_costs
    from qpass.frontends.hf import load
    from qpass.measure.bench import measure_case
    from qpass.measure.bench_verify import WIDTHS, measure_verification

    name = Path(model).name
    if asked.costs:
        for scheme in asked.schemes:
            with progress.waiting(f"{scheme}: load, compile cold and warm, run, each in a process of its own"):
                yield from measure_costs(model, scheme, prompt=min(asked.prompt_len), calibrated=asked.calibrated)
    loaded = load(model)
    common = {"model": name, "threads": torch.get_num_threads(), "run": time.strftime("%Y-%m-%dT%H:%M:%S")}
    drafted = asked.draft_with or [scheme for scheme in asked.schemes if scheme not in BASELINES]
    runs = contenders(
        loaded, asked.schemes, asked.batch[0], asked.draft, drafted if asked.draft else (), asked.calibrated
    )
    for batch in asked.batch:
        for tokens in asked.prompt_len:
            ids = prompt_ids(loaded, asked.text, tokens, batch)
            with progress.waiting(f"{tokens}-token prompt, batch {batch}: {len(runs)} variants in turns"):
                for run in runs:
                    run.warm_up(batch)
                yield from measure_case([run.contender for run in runs], ids, asked.new, asked.rounds, common)
    if asked.draft is None:
        return
    for run in runs:
        if run.drafts and 1 in asked.batch:
            context = getattr(run.decoder, "context", None) or 1024
            widths = [k for k in WIDTHS if k < context // 4]
            with progress.waiting(f"{run.scheme}: what checking K tokens costs"):
                about = common | {"scheme": run.scheme}
                yield from measure_verification(
                    run.decoder, about, context=min(512, context // 2), widths=widths, rounds=4 * asked.rounds
                )


def prompt_ids(loaded: Any, text: Path | None, tokens: int, batch: int) -> Any:
    """int64 [batch, tokens] of running text: the evaluation part of Python's own library, or ``text``."""
    from qpass.measure.corpus import read_text, windows

    words = read_text(text, "evaluation")[
        : 12 * tokens * batch + 4096
    ]  # more than enough: a token has 3 letters or more
    return windows(loaded.tokenizer(words, return_tensors="pt").input_ids, tokens, batch)
