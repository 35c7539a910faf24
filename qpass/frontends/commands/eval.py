"""``qpass eval``: perplexity, divergence from the full-precision model, and HumanEval, scheme by scheme."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from qpass.errors import OptionError
from qpass.frontends import progress
from qpass.frontends.commands import session

if TYPE_CHECKING:
    from torch import Tensor

    from qpass.frontends.hf import Loaded
    from qpass.measure.record import Record

TASKS = ("perplexity", "kl", "humaneval")

FULL = "bf16"
"""The name under which the model as it was loaded stands among the schemes."""

SEGMENT = 2048
"""Tokens in a row that a part of a long text is read in; the parts are spread over all of it."""


@dataclass(frozen=True)
class Asked:
    """What is to be measured, and how."""

    model: str
    schemes: tuple[str, ...]
    tasks: tuple[str, ...]
    output: Path | None = None
    text: Path | None = None
    tokens: int = 16384
    length: int = 512
    stride: int = 256
    batch: int = 8
    problems: int | None = None
    chat: bool | None = None
    max_new_tokens: int = 512
    draft: str | None = None
    exclude: tuple[str, ...] = ()
    lowering: str | None = None
    reference: str | None = None

    def check(self) -> None:
        """Raises OptionError for what needs no model to be seen."""
        for name in self.tasks:
            if name not in TASKS:
                raise OptionError(f"unknown task {name!r}; accepted: {', '.join(TASKS)}")
        if not self.tasks or not self.schemes:
            raise OptionError("give at least one scheme and one task")
        if self.output is not None and self.output.is_dir():
            raise OptionError(f"{self.output} is a folder; accepted: a file that JSON lines are added to")
        if not 1 <= self.stride < self.length:
            raise OptionError(
                f"stride is {self.stride}; accepted: 1 to {self.length - 1}, one below the window's length"
            )
        for scheme in self.schemes:
            if scheme != FULL:
                session.check(self.model, scheme)

    def about(self, scheme: str, **more: Any) -> dict[str, Any]:
        """The settings that a result depends on."""
        how = {"exclude": list(self.exclude), "lowering": self.lowering}
        said = {name: value for name, value in how.items() if value}
        return {"model": Path(self.model).name, "scheme": scheme, **(said if scheme != FULL else {}), **more}


def evaluate(asked: Asked) -> None:
    """A table on stdout, records in the file as they come; what is in the file already is not measured again.

    Raises QpassError.
    """
    asked.check()
    from qpass.measure import record

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    known = list(record.read(asked.output)) if asked.output is not None and asked.output.exists() else []
    done: list[Record] = []

    def keep(records: Iterable[Record]) -> None:
        records = list(records)
        done.extend(records)
        if asked.output is not None:
            record.append(asked.output, records)

    def had(wanted: Mapping[str, Any], *names: str) -> bool:
        """Whether every one of ``names`` was measured so before; then they are in the table."""
        found = {each.what: each for each in [*known, *done] if _matches(each.settings, wanted)}
        done.extend(found[name] for name in names if name in found and found[name] not in done)
        return all(name in found for name in names)

    ids = None
    for scheme in asked.schemes:
        loaded = _load(asked.model)  # anew for each scheme: what was packed for the one before goes with its weights
        if ids is None and {"perplexity", "kl"} & set(asked.tasks):
            ids = _tokens(asked, loaded)
        if ids is not None:
            _text_quality(asked, scheme, loaded, ids, had, keep)
        if "humaneval" in asked.tasks:
            _humaneval(asked, scheme, loaded, had, keep, console)
        del loaded
        _forget()
    Console().print(table(done, asked))


def _load(model: str) -> Loaded:
    from qpass.frontends.hf import load

    return load(model)


def _forget() -> None:
    """Compiled code holds the model that it was compiled for."""
    import torch

    torch._dynamo.reset()
    gc.collect()


def _matches(settings: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(settings.get(name) == value for name, value in json.loads(json.dumps(wanted)).items())


def _tokens(asked: Asked, loaded: Loaded) -> Tensor:
    """int64 [T]: the text's tokens; of a longer text so many, in segments that are spread over it."""
    from qpass.measure.corpus import read_text, windows

    if asked.tokens < 2:
        raise OptionError(f"{asked.tokens} tokens; accepted: 2 or more")
    with progress.waiting("reading the text"):
        text = read_text(asked.text, "evaluation")
        ids = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    if len(ids) <= asked.tokens:
        return ids
    segment = min(SEGMENT, asked.tokens)
    return windows(ids, segment, asked.tokens // segment).flatten()


def _text_quality(
    asked: Asked,
    scheme: str,
    loaded: Loaded,
    ids: Tensor,
    had: Callable[..., bool],
    keep: Callable[[Iterable[Record]], None],
) -> None:
    """Perplexity and divergence from one walk over the text, model and reference side by side."""
    from qpass.measure.divergence import Divergence
    from qpass.measure.perplexity import Perplexity, scored, windows

    place = {
        "text": "standard library" if asked.text is None else asked.text.name,
        "fingerprint": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16],
        "tokens": len(ids),
        "length": asked.length,
        "stride": asked.stride,
    }
    compares = "kl" in asked.tasks and scheme != FULL
    mine = asked.about(scheme, **place)
    against = {"reference": Path(asked.reference or asked.model).name}
    whole = {**asked.about(FULL, **place), "model": against["reference"]}
    wanted = {
        "perplexity": "perplexity" in asked.tasks and not had(mine, "perplexity"),
        "kl": compares and not had({**mine, **against}, "kl", "kl_p99", "top1_agreement"),
    }
    if compares:
        had(whole, "perplexity")
    if not any(wanted.values()):
        return
    walk = functools.partial(scored, ids=ids, length=asked.length, stride=asked.stride)
    fast = None if scheme == FULL else _compiled(asked, scheme, loaded)
    ours, theirs, apart = Perplexity(), Perplexity(), Divergence()
    reference = _load(asked.reference).model if asked.reference else loaded.model
    total = len(windows(len(ids), asked.length, asked.stride)[1])
    with progress.counting(f"{scheme}: text", total) as count:
        walked = walk(_logits(fast or loaded.model), on_batch=lambda done, _: count(done))
        beside = walk(_logits(reference)) if wanted["kl"] else None
        for found, targets in walked:
            ours.add(found, targets)
            if beside is not None:
                full, _ = next(beside)
                theirs.add(full, targets)
                apart.add(full, found)
    about = {**mine, **_bytes(fast)}
    if wanted["perplexity"]:
        keep(ours.records(about))
    if wanted["kl"]:
        keep(apart.records({**about, **against}))
        if not had(whole, "perplexity"):
            keep(theirs.records(whole))


def _compiled(asked: Asked, scheme: str, loaded: Loaded) -> Any:
    """Insisting: a site that this machine would leave as it was, because that is faster, is quantized all the same."""
    import qpass

    return qpass.compile(
        loaded.model, scheme=scheme, exclude=asked.exclude, lowering=asked.lowering, insist=True, dynamic=False
    )


def _logits(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def _bytes(fast: Any) -> dict[str, int]:
    if fast is None:
        return {}
    import qpass

    found = qpass.explain(fast)
    return {"linear_bytes": found.bytes_after, "linear_bytes_before": found.bytes_before}


def _humaneval(
    asked: Asked,
    scheme: str,
    loaded: Loaded,
    had: Callable[..., bool],
    keep: Callable[[Iterable[Record]], None],
    console: Console,
) -> None:
    from qpass.frontends.speculation import Speculation
    from qpass.measure import humaneval, humaneval_samples, sandbox

    chosen = humaneval.problems(asked.problems)
    templated = getattr(loaded.tokenizer, "chat_template", None) is not None
    chat = templated if asked.chat is None else asked.chat
    about = asked.about(scheme, task="humaneval", chat=chat, max_new_tokens=asked.max_new_tokens, problems=len(chosen))
    if had(about, "humaneval_pass@1"):
        return
    for each in sandbox.check(humaneval.LIMITS):
        console.print(f"[yellow]the sandbox is not whole: {each}[/yellow]")
    release = scheme not in (FULL, "w16a16")  # insists, as on the text; nothing reads the full weights any more
    spec = Speculation(
        loaded.model,
        asked.draft,
        scheme="w16a16" if scheme == FULL else scheme,
        exclude=asked.exclude,
        lowering=asked.lowering,
        release_weights=release,
        tokenizer=loaded.tokenizer,
    )
    session.tell_attention(spec.decoder)
    with progress.waiting(f"{scheme}: compiling for {asked.batch} rows"):
        spec.warm_up(asked.batch)
    folder = asked.output.parent if asked.output is not None else Path.cwd()
    name = asked.output.stem if asked.output is not None else "qpass-eval"
    with progress.counting(f"{scheme}: HumanEval", len(chosen)) as count:
        samples = humaneval_samples.generate(
            spec.speculator,
            loaded.tokenizer,
            chosen,
            folder / f"{name}.samples.jsonl",
            about=about,
            chat=chat,
            batch=asked.batch,
            max_new_tokens=asked.max_new_tokens,
            on_done=lambda done, _: count(done),
        )
    with progress.counting(f"{scheme}: tests", len(chosen)) as count:
        verdicts = humaneval.judge(
            chosen, {n: s.completion for n, s in samples.items()}, on_done=lambda done, _: count(done)
        )
    cut = sum(not sample.finished for sample in samples.values())
    tokens = sum(sample.tokens for sample in samples.values())
    keep(humaneval.records(verdicts, {**about, "unfinished": cut, "new_tokens": tokens, "draft": asked.draft}))


def table(records: Sequence[Record], asked: Asked) -> Table:
    """A row a scheme: each number with the bounds of its 80% interval, perplexity with its loss over full precision."""
    found = {(each.settings["scheme"], each.what): each for each in records}
    columns = {
        "perplexity": "perplexity",
        "kl": "KL, nats",
        "kl_p99": "KL p99",
        "top1_agreement": "same top-1",
        "humaneval_pass@1": "HumanEval pass@1",
    }
    shown = {what: title for what, title in columns.items() if any(key[1] == what for key in found)}
    made = Table(title=f"qpass eval: {Path(asked.model).name}", title_justify="left")
    made.add_column("scheme")
    for title in shown.values():
        made.add_column(title, justify="right", no_wrap=True)
    base = found.get((FULL, "perplexity"))
    for scheme in dict.fromkeys(key[0] for key in sorted(found, key=lambda key: key[0] != FULL)):
        made.add_row(scheme, *(_cell(found.get((scheme, what)), base) for what in shown))
    return made


def _cell(record: Record | None, base: Record | None) -> str:
    if record is None:
        return "-"
    if record.what == "perplexity":
        over = "" if base is None or base is record else f" ({record.value / base.value - 1:+.2%})"
        return f"{record.value:.3f}{over}"
    if record.what == "top1_agreement":
        return f"{record.value:.2%}"
    if record.what == "humaneval_pass@1":
        low, high = record.settings["interval_95"]
        return f"{record.value:.1f}% [{low:.0f}..{high:.0f}] of {record.n}"
    return f"{record.value:.2g}"
