"""What the commands share: a quiet process with its caches in one place, and a model made ready to generate."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpass.errors import OptionError, UnsupportedError
from qpass.frontends import progress
from qpass.frontends.hf import Loaded
from qpass.kernels.store import cache_folder, open_folder


def prepare(*, debug: bool = False) -> None:
    """Set up the process before torch is imported: compiled code in qpass' cache, and no noise unless ``debug``.

    A compiled graph found in the cache makes the second run of a command start in seconds.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(open_folder(cache_folder()) / "inductor"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines on stderr
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore")
    for name in ("torch", "torchao", "torch._inductor", "torch._dynamo", "torch.fx", "transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def check(model: str, scheme: str) -> None:
    """What can be known to fail should cost neither the import of torch nor the loading of a model. Raises QpassError."""
    from qpass.cpu import detect
    from qpass.frontends.hf import locate
    from qpass.kernels.build import find_compiler
    from qpass.scheme import Scheme

    Scheme.parse(scheme)
    detect()
    find_compiler()
    locate(model)


def chosen(scheme: str, stats: Path | None, alpha: str, recipe: Path | None) -> dict[str, Any]:
    """``--scheme``, ``--stats``, ``--alpha`` and ``--recipe`` as ``qpass.compile`` takes them, the files read. Raises QpassError."""
    from qpass.frontends.options import Options

    arguments = {"scheme": None if recipe is not None else scheme, **calibration(stats, alpha, recipe)}
    Options.make(**arguments)
    return arguments


def calibration(stats: Path | None, alpha: str, recipe: Path | None) -> dict[str, Any]:
    """``--stats``, ``--alpha`` and ``--recipe`` as ``qpass.compile`` takes them. Raises OptionError."""
    value: Any = None if alpha == "none" else alpha
    if alpha not in ("auto", "none"):
        try:
            value = float(alpha)
        except ValueError:
            raise OptionError(f"--alpha {alpha}: accepted are auto, none and a number from 0 to 1") from None
    return {"stats": stats, "alpha": value if stats is not None or alpha != "none" else "auto", "recipe": recipe}


@dataclass(frozen=True)
class Ready:
    """A model behind a decoder, both steps compiled. ``decoder`` is None where the model can't have one; then
    ``fallback`` is the compiled model itself and ``reason`` says why."""

    loaded: Loaded
    decoder: Any  # qpass.runtime.decoder.Decoder
    fallback: Any
    reason: str
    seconds: float
    graphs: int
    explanation: Any  # qpass.frontends.explain.Explanation, None for the baseline


def compiler(
    scheme: Any, exclude: Sequence[str], lowering: str | None, release_weights: bool, **more: Any
) -> Callable[..., Any]:
    """``qpass.compile`` with its arguments given, as the decoder wants it."""
    import qpass

    return functools.partial(
        qpass.compile,
        scheme=scheme,
        exclude=tuple(exclude),
        lowering=lowering,
        release_weights=release_weights,
        fullgraph=True,
        dynamic=False,
        **more,
    )


def baseline(model: Any = None, *, frozen: bool = False) -> Callable[..., Any]:
    """Stock Inductor, for comparison: the same steps, the same cache, bf16 weights.

    ``frozen``: the weights are packed for oneDNN, which keeps a second copy of them.
    Raises UnsupportedError for a ``model`` that was loaded as codes.
    """
    import torch

    from qpass.lowering.released import released_name

    name = next((n for p in model.parameters() if (n := released_name(p))), None) if model is not None else None
    if name is not None:
        raise UnsupportedError(f"stock Inductor needs weights in full precision, and {name} was loaded as codes")

    options = {"freezing": True} if frozen else None
    return functools.partial(torch.compile, backend="inductor", fullgraph=True, dynamic=False, options=options)


def ready(loaded: Loaded, compile: Callable[..., Any], what: str, kv_dtype: str | None = None) -> Ready:
    """Compile and warm up. A model that can't run on the static cache gets its own ``generate``, and a reason.

    Raises OptionError for a module pattern that matches nothing, and for a ``kv_dtype`` that the cache can't have.
    """
    import qpass
    from qpass.runtime.decoder import Decoder

    whole = compile(loaded.model)  # costs nothing before its first call, but checks the patterns against the modules
    try:
        decoder = Decoder(loaded.model, compile, kv_dtype=kv_dtype)
    except UnsupportedError as error:
        return Ready(loaded, None, whole, str(error), 0.0, 0, None)
    tell_attention(decoder)
    with progress.waiting(f"compiling {what}"):
        seconds = decoder.warm_up()
    own = hasattr(decoder.likely_step, "_qpass_backend")
    return Ready(
        loaded, decoder, None, "", seconds, decoder.graphs, qpass.explain(decoder.likely_step) if own else None
    )


def tell_attention(decoder: Any) -> None:
    """Say on stderr why a decoder's attention is not native, where it isn't."""
    from rich.console import Console

    if decoder.attention_refusal:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"[yellow]attention runs as plain torch, slowly: {decoder.attention_refusal}[/yellow]")
