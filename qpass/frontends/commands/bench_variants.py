"""The variants of ``qpass bench``: stock Inductor, and schemes with and without a draft, each ready to generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qpass.frontends import progress
from qpass.frontends.commands import session

RECIPE = "recipe"
"""Each layer in the scheme that a recipe says."""
STOCK, FROZEN = "stock", "stock-frozen"
BASELINES = (STOCK, FROZEN)
"""Inductor on the unquantized model, in the same loop on the same static cache: as torch.compile comes, and with its weights
packed once a graph (freezing), which is faster and takes twice the memory or more."""


@dataclass(frozen=True)
class Draft:
    """What guesses ahead: a model's folder or id, "ngram", "layers:N", or several with commas; and how."""

    name: str
    scheme: str = "w8a8-dynamic"
    vocabulary: int | None = None
    k: int | str = "auto"

    @property
    def given(self) -> Any:
        """What ``Speculation`` takes."""
        names = [name.strip() for name in self.name.split(",") if name.strip()]
        return names if len(names) > 1 else names[0]


@dataclass(frozen=True)
class Run:
    """One row of the table to come."""

    scheme: str
    contender: Any  # qpass.measure.bench.Contender
    decoder: Any  # qpass.runtime.decoder.Decoder
    warm_up: Callable[[int], float]  # for a batch size
    drafts: bool = False


@dataclass(frozen=True)
class Calibrated:
    """What ``qpass calibrate`` and ``qpass search`` wrote, for the schemes that take it."""

    stats: Path | None = None
    alpha: str = "auto"
    recipe: Path | None = None
    only: Sequence[str] = ()  # the schemes that take the statistics; none given: all with int8 activations

    def of(self, scheme: str) -> dict[str, Any]:
        """Arguments of ``qpass.compile``. Raises OptionError."""
        recipe = self.recipe if scheme == RECIPE else None
        calibration = session.calibration(self.stats_for(scheme), self.alpha, recipe)
        return {"scheme": None if scheme == RECIPE else scheme, **calibration}

    def stats_for(self, scheme: str) -> Path | None:
        return self.stats if scheme == RECIPE or self.smooths(scheme) else None

    def smooths(self, scheme: str) -> bool:
        return self.stats is not None and (scheme in self.only if self.only else "a8" in scheme)

    def name(self, scheme: str) -> str:
        return f"{scheme} (smoothed)" if self.smooths(scheme) else scheme


def contenders(
    loaded: Any, schemes: Sequence[str], batch: int, draft: Draft | None, drafted: Sequence[str], calibrated: Calibrated
) -> list[Run]:
    """Every scheme alone and, where it is among ``drafted``, with the draft too; the two share one decoder."""
    runs: list[Run] = []
    for scheme in schemes:
        guessing = draft if scheme in drafted else None
        with progress.waiting(f"compiling {scheme}" + (f" with {guessing.name}" if guessing else "")):
            runs += _of_scheme(loaded, scheme, batch, guessing, calibrated)
    return runs


def _of_scheme(loaded: Any, scheme: str, batch: int, draft: Draft | None, calibrated: Calibrated) -> list[Run]:
    import qpass
    from qpass.frontends.speculation import Speculation
    from qpass.measure.bench import Contender
    from qpass.runtime.decoder import Decoder
    from qpass.runtime.speculate import Speculator

    if scheme in BASELINES:
        decoder = Decoder(loaded.model, session.baseline(loaded.model, frozen=scheme == FROZEN))
        decoder.warm_up(batch)
        plain = Contender(scheme, partial(_generate, Speculator(decoder), None), work_of(loaded, decoder, scheme))
        return [Run(scheme, plain, decoder, decoder.warm_up)]
    rest: dict[str, Any] = {"k": 0}
    if draft is not None:
        rest = {"k": draft.k, "draft_scheme": draft.scheme, "draft_vocabulary": draft.vocabulary}
    target = qpass.compile(loaded.model, fullgraph=True, **calibrated.of(scheme))
    spec = Speculation(target, None if draft is None else draft.given, tokenizer=loaded.tokenizer, **rest)
    spec.warm_up(batch)
    work, variant = work_of(loaded, spec.decoder, scheme), calibrated.name(scheme)
    plain = Contender(variant, partial(_generate, Speculator(spec.decoder), None), work)
    runs = [Run(variant, plain, spec.decoder, spec.warm_up)]
    if draft is not None:
        name = ",".join(Path(part).name for part in draft.name.split(","))
        about = {"draft": name, "draft_scheme": draft.scheme, "draft_vocabulary": draft.vocabulary, "k": draft.k}
        generate = partial(_generate, spec.speculator, loaded.tokenizer)
        contender = Contender(f"{variant} + {name}", generate, work, about)
        runs.append(Run(variant, contender, spec.decoder, spec.warm_up, drafts=True))
    return runs


def _generate(speculator: Any, tokenizer: Any, ids: Any, new: int) -> Any:
    """One generation as an outcome; with a draft (a tokenizer is given) also what became of its guesses."""
    from qpass.frontends.trace import to_settings
    from qpass.measure.bench import Outcome

    speculator.generate(ids, max_new_tokens=new, eos_token_id=())
    stats = speculator.stats
    if tokenizer is None:
        return Outcome(stats.ttft_ms, stats.tpot_ms)
    about = {
        "tokens_a_step": stats.tokens_a_step,
        "acceptance": stats.acceptance if stats.acceptance == stats.acceptance else 0.0,
        "bound_ms": stats.bound_ms,
        "draft_share": stats.draft_share,
        "loop_share": stats.loop_share,
        "read_ms": stats.read_ms,
    }
    return Outcome(stats.ttft_ms, stats.tpot_ms, about, to_settings(stats, tokenizer, ids))


def work_of(loaded: Any, decoder: Any, scheme: str) -> Any:
    """What a variant must read and multiply at least, from the shapes of its linears, its cache and its explanation."""
    import qpass
    from qpass.measure.bench import Work
    from qpass.scheme import Scheme

    model = loaded.model
    head = model.get_output_embeddings()
    tables = {id(m) for m in model.modules() if type(m).__name__ == "Embedding"}
    matrices = {
        id(m): m.weight
        for m in model.modules()
        if id(m) not in tables and getattr(getattr(m, "weight", None), "dim", lambda: 0)() == 2
    }
    size = sum(weight.numel() * weight.element_size() for weight in matrices.values())
    if scheme not in BASELINES:
        explained = qpass.explain(decoder.likely_step)
        size += explained.bytes_after - explained.bytes_before
    head_macs = head.weight.numel() if head is not None else 0
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    attention = sum(heads * (s.key_dim + s.value_dim) for s in decoder.shapes)
    cache = decoder.allocate(1, 64)
    return Work(
        weight_bytes=size,
        kv_bytes=cache.bytes // cache.length,
        macs=sum(weight.numel() for weight in matrices.values()) - head_macs,
        head_macs=head_macs,
        attention_macs=attention,
        peak="int8"
        if scheme not in (*BASELINES, RECIPE) and Scheme.parse(scheme).activation.startswith("a8")
        else "bf16",
    )
