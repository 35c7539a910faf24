"""``qpass quantize``: a model in full precision in, an artefact out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qpass.errors import OptionError
from qpass.frontends.commands import session

ALGORITHMS = ("rtn", "gptq", "awq")


def quantize(
    model: str, out: Path, *, scheme: str, algorithm: str, calibration: Path | None, exclude: Sequence[str]
) -> None:
    """What was written is told on stderr. Raises QpassError."""
    if algorithm not in ALGORITHMS:
        raise OptionError(f"unknown algorithm {algorithm!r}; accepted: {', '.join(ALGORITHMS)}")
    if algorithm == "rtn" and calibration is not None:
        raise OptionError("rtn reads no data; --calibration is for gptq and awq")
    if calibration is not None and not calibration.exists():
        raise OptionError(f"{calibration} does not exist; --calibration takes a text file or a folder of them")
    if out.is_file():
        raise OptionError(f"{out} is a file; an artefact is written to a folder")
    session.check(model, scheme)
    from qpass.measure.memory import peak_bytes

    started = time.perf_counter()
    find = _rtn if algorithm == "rtn" else _calibrated
    quantized, tokenizer = find(model, scheme, exclude, algorithm, calibration)
    _write(quantized, tokenizer, out)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[dim]{out}: {size / 1e6:.0f} MB, {scheme} by {algorithm}, {time.perf_counter() - started:.0f} s, "
        f"{peak_bytes() / 1e6:.0f} MB peak[/dim]"
    )


def _rtn(model: str, scheme: str, exclude: Sequence[str], algorithm: str, calibration: Path | None) -> tuple[Any, Any]:
    """Tensor by tensor as the shards are read."""
    from qpass.frontends import progress
    from qpass.frontends.hf import load_tokenizer
    from qpass.frontends.load import load

    tokenizer = load_tokenizer(model)
    with progress.waiting(f"quantizing {Path(model).name}, {scheme}"):
        return load(model, scheme=scheme, exclude=exclude), tokenizer


def _calibrated(
    model: str, scheme: str, exclude: Sequence[str], algorithm: str, calibration: Path | None
) -> tuple[Any, Any]:
    import qpass
    from qpass.frontends.batches import read_batches
    from qpass.frontends.hf import load

    loaded = load(model)
    batches = read_batches(calibration, loaded.tokenizer)
    found = qpass.quantize(loaded.model, batches, scheme=scheme, algorithm=algorithm, exclude=exclude)
    return found if found is not None else loaded.model, loaded.tokenizer


def _write(model: Any, tokenizer: Any, out: Path) -> None:
    from qpass.checkpoints.atomic import new_folder
    from qpass.frontends.huggingface import is_weights, save

    with new_folder(out, replaces=is_weights) as folder:
        save(model, folder)
        tokenizer.save_pretrained(folder)
