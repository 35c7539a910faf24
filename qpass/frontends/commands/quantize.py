"""``qpass quantize``: a model in full precision in, an artefact out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qpass.errors import OptionError
from qpass.frontends.commands import session

ALGORITHMS = ("rtn", "gptq", "awq", "awq+gptq", "clip")
LENGTH, COUNT = 512, 64
"""Tokens a window of the calibration, and windows."""


def quantize(
    model: str, out: Path, *, scheme: str, algorithm: str, calibration: Path | None, exclude: Sequence[str]
) -> None:
    """What was written is told on stderr. Raises QpassError."""
    if algorithm not in ALGORITHMS:
        raise OptionError(f"unknown algorithm {algorithm!r}; accepted: {', '.join(ALGORITHMS)}")
    if algorithm in ("rtn", "clip") and calibration is not None:
        raise OptionError(f"{algorithm} reads no data; --calibration is for gptq and awq")
    if calibration is not None and not calibration.exists():
        raise OptionError(f"{calibration} does not exist; --calibration takes a text file or a folder of them")
    if out.is_file():
        raise OptionError(f"{out} is a file; an artefact is written to a folder")
    session.check(model, scheme)
    from qpass.measure.memory import peak_bytes

    started = time.perf_counter()
    find = _rtn if algorithm == "rtn" else _calibrated
    quantized, tokenizer, told = find(model, scheme, exclude, algorithm, calibration)
    _write(quantized, tokenizer, out, scheme, told)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[dim]{out}: {size / 1e6:.0f} MB, {scheme} by {algorithm}, {time.perf_counter() - started:.0f} s, "
        f"{peak_bytes() / 1e6:.0f} MB peak[/dim]"
    )


Found = tuple[Any, Any, dict[str, Any] | None]
"""The model, its tokenizer, and what is to be told of the calibration."""


def _rtn(model: str, scheme: str, exclude: Sequence[str], algorithm: str, calibration: Path | None) -> Found:
    """Tensor by tensor as the shards are read."""
    from qpass.frontends import progress
    from qpass.frontends.hf import load_tokenizer
    from qpass.frontends.load import load

    tokenizer = load_tokenizer(model)
    with progress.waiting(f"quantizing {Path(model).name}, {scheme}"):
        return load(model, scheme=scheme, exclude=exclude), tokenizer, None


def _calibrated(model: str, scheme: str, exclude: Sequence[str], algorithm: str, calibration: Path | None) -> Found:
    import qpass
    from qpass.frontends.batches import read_batches
    from qpass.frontends.hf import load

    loaded = load(model)
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", LENGTH)
    batches = list(read_batches(calibration, loaded.tokenizer, length=min(LENGTH, longest), count=COUNT))
    digest = hashlib.sha256(b"".join(batch["input_ids"].numpy().tobytes() for batch in batches))
    found = qpass.quantize(loaded.model, batches, scheme=scheme, algorithm=algorithm, exclude=exclude)
    told = {"algorithm": algorithm, "tokens": sum(batch["input_ids"].numel() for batch in batches)}
    return found, loaded.tokenizer, told | {"fingerprint": digest.hexdigest()}


def _write(model: Any, tokenizer: Any, out: Path, scheme: str, calibration: dict[str, Any] | None) -> None:
    from qpass.checkpoints.atomic import new_folder
    from qpass.frontends.huggingface import is_weights, save

    with new_folder(out, replaces=is_weights) as folder:
        save(model, folder, scheme=scheme, calibration=calibration)
        tokenizer.save_pretrained(folder)
