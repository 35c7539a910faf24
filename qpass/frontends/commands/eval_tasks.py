"""The tasks of ``qpass eval``: perplexity and divergence on text, and HumanEval. Each adds its records."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qpass.errors import OptionError
from qpass.frontends import progress
from qpass.frontends.commands import session
from qpass.frontends.commands.eval_asked import FULL, RECIPE, Asked

if TYPE_CHECKING:
    from torch import Tensor

    from qpass.frontends.hf import Loaded
    from qpass.measure.record import Record
    from qpass.runtime.speculate import Speculator

SEGMENT = 2048
"""Tokens in a row that a part of a long text is read in; the parts are spread over all of it."""


def load(model: str) -> Loaded:
    from qpass.frontends.hf import load

    return load(model)


def text_tokens(asked: Asked, loaded: Loaded) -> Tensor:
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


def text_quality(
    asked: Asked,
    scheme: str,
    loaded: Loaded,
    ids: Tensor,
    had: Callable[..., bool],
    keep: Callable[[Iterable[Record]], None],
) -> None:
    """Perplexity and divergence from one walk over the text, model and reference side by side."""
    from qpass.lowering.given import given_of
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
    if compares and asked.reference is None and any(given_of(p) is not None for p in loaded.model.parameters()):
        raise OptionError(
            f"{asked.model} is quantized already: give its full-precision model with --reference, or leave kl out"
        )
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
    fast = None if scheme == FULL else compiled(asked, scheme, loaded)
    ours, theirs, apart = Perplexity(), Perplexity(), Divergence()
    reference = load(asked.reference).model if asked.reference else loaded.model
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


def compiled(asked: Asked, scheme: str, loaded: Loaded, *, release_weights: bool = False) -> Any:
    """Insisting: a site that this machine would leave as it was, because that is faster, is quantized all the same."""
    import qpass

    return qpass.compile(
        loaded.model,
        scheme=None if scheme == RECIPE else "w16a16" if scheme == FULL else scheme,
        exclude=asked.exclude,
        lowering=asked.lowering,
        release_weights=release_weights,
        insist=True,
        dynamic=False,
        **session.calibration(asked.stats, asked.alpha, asked.recipe if scheme == RECIPE else None),
    )


def _logits(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def _bytes(fast: Any) -> dict[str, int]:
    if fast is None:
        return {}
    import qpass

    found = qpass.explain(fast)
    return {"linear_bytes": found.bytes_after, "linear_bytes_before": found.bytes_before}


def code_quality(
    asked: Asked,
    scheme: str,
    loaded: Loaded,
    had: Callable[..., bool],
    keep: Callable[[Iterable[Record]], None],
    console: Console,
) -> None:
    """HumanEval. Answers stand in a file beside the output, so that an interrupted run goes on."""
    from qpass.measure import humaneval, humaneval_samples, sandbox

    chosen = humaneval.problems(asked.problems)
    templated = getattr(loaded.tokenizer, "chat_template", None) is not None
    chat = templated if asked.chat is None else asked.chat
    about = asked.about(scheme, task="humaneval", chat=chat, max_new_tokens=asked.max_new_tokens, problems=len(chosen))
    if had(about, "humaneval_pass@1"):
        return
    for each in sandbox.check(humaneval.LIMITS):
        console.print(f"[yellow]the sandbox is not whole: {each}[/yellow]")
    speculator = _answering(asked, scheme, loaded)
    answers = functools.partial(
        humaneval_samples.generate,
        speculator,
        loaded.tokenizer,
        chosen,
        about=about,
        chat=chat,
        batch=asked.batch,
        max_new_tokens=asked.max_new_tokens,
    )
    with progress.counting(f"{scheme}: HumanEval", len(chosen)) as count, tempfile.TemporaryDirectory() as nowhere:
        place = Path(nowhere) / "-" if asked.output is None else asked.output
        samples = answers(path=place.with_suffix(".samples.jsonl"), on_done=lambda done, _: count(done))
    with progress.counting(f"{scheme}: tests", len(chosen)) as count:
        verdicts = humaneval.judge(
            chosen, {n: s.completion for n, s in samples.items()}, on_done=lambda done, _: count(done)
        )
    cut = sum(not sample.finished for sample in samples.values())
    tokens = sum(sample.tokens for sample in samples.values())
    keep(humaneval.records(verdicts, {**about, "unfinished": cut, "new_tokens": tokens, "draft": asked.draft}))


def _answering(asked: Asked, scheme: str, loaded: Loaded) -> Speculator:
    """What answers HumanEval's prompts, compiled for a batch."""
    from qpass.frontends.speculation import Speculation
    from qpass.runtime.decoder import Decoder
    from qpass.runtime.speculate import Speculator

    waiting = progress.waiting(f"{scheme}: compiling for {asked.batch} rows")
    if scheme == FULL and asked.draft is None:
        decoder = Decoder(loaded.model, session.baseline(loaded.model, frozen=True))
        session.tell_attention(decoder)
        with waiting:
            decoder.warm_up(asked.batch)
        return Speculator(decoder)
    release = scheme not in (FULL, "w16a16")  # nothing reads the full weights any more
    spec = Speculation(
        compiled(asked, scheme, loaded, release_weights=release), asked.draft, tokenizer=loaded.tokenizer
    )
    session.tell_attention(spec.decoder)
    with waiting:
        spec.warm_up(asked.batch)
    return spec.speculator
