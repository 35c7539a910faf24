"""``qpass.calibrate``: run a model over some batches and keep what each of its linears reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qpass.errors import OptionError, QpassError
from qpass.frontends import progress
from qpass.frontends.batches import read_batches
from qpass.frontends.instrument import Shared, instrument
from qpass.frontends.statistics import Statistics

LEAST_TOKENS = 128
"""Fewer rows than this tell nothing of what is rare, and the rare is what calibration is for."""

_SAVE_EVERY = 8  # batches


def calibrate(
    model: nn.Module,
    batches: Any,
    *,
    tokenizer: Any = None,
    samples: int = 64,
    length: int = 512,
    hessian: bool = False,
    resume: str | Path | None = None,
    settings: str = "",
    seed: int = 0,
) -> Statistics:
    """What the linears of ``model`` read while it runs over ``batches``, seen at the sites that the passes rewrite.

    batches   for a model that reads ``input_ids``: a path of text (None: the standard library's source), of which ``samples``
              windows of ``length`` tokens are taken; token ids int64 [n, length]; a DataLoader or any iterable of ids,
              mappings or strings. Text needs a ``tokenizer``. For other models an iterable of what they are called
              with: tensors, tuples, mappings
    hessian   also keep each channel's sum of squares
    resume    a file that keeps what was seen so far, written every few batches and continued from if it is there (and
              of the same ``settings``, a description of the batches); removed at the end

    Raises OptionError for an empty or tiny set, QpassError for NaN or infinity in an activation (it names the layer),
    UnsupportedError for another device or a model in training mode.
    """
    resume = None if resume is None else Path(resume)
    stats = _begun(resume, settings, model) or Statistics(settings=settings)
    batches = _readable(model, batches, tokenizer, samples, length)
    done = stats.batches

    def enter(shared: Shared, x: Tensor) -> None:
        observer = stats.inputs.get(shared.names)
        if observer is None:
            observer = stats.observe(shared.names, [r.ref.shape for r in shared.readers], x.dtype, hessian, seed)
        try:
            observer.see(x)
        except ValueError as error:
            raise QpassError(f"the input of {shared.names[0]} holds {error} in batch {stats.batches}") from error

    run = instrument(model, enter=enter)
    total = len(batches) if hasattr(batches, "__len__") else None
    with progress.counting("calibrating", total) as show:
        for index, batch in enumerate(batches):
            if index >= done:
                run(batch)
                stats.batches = index + 1
                if resume is not None and stats.batches % _SAVE_EVERY == 0:
                    stats.save(resume)
            show(index + 1)
    if not stats.batches:
        raise OptionError("the calibration set is empty: no batch came")
    if not stats.inputs:
        raise OptionError("the model has no linear layer over a Parameter that could be observed")
    if stats.tokens < LEAST_TOKENS:
        raise OptionError(
            f"the calibration set has {stats.tokens} tokens; at least {LEAST_TOKENS} are needed, some thousands are good"
        )
    if resume is not None:
        resume.unlink(missing_ok=True)
    return stats


def _readable(model: nn.Module, batches: Any, tokenizer: Any, samples: int, length: int) -> Iterable[Any]:
    if "input_ids" in inspect.signature(model.forward).parameters:
        if batches is None or isinstance(batches, str | Path | Tensor):
            return list(read_batches(batches, tokenizer, length=length, count=samples))
        return read_batches(batches, tokenizer, length=length, count=None)
    if isinstance(batches, Tensor | str | bytes) or not isinstance(batches, Iterable):
        raise OptionError(
            f"batches is a list or another iterable of batches, not {type(batches).__name__}; wrap a single one in a list"
        )
    return batches


def _begun(path: Path | None, settings: str, model: nn.Module) -> Statistics | None:
    if path is None or not path.is_file():
        return None
    stats = Statistics.load(path)
    if stats.settings != settings:
        raise OptionError(
            f"{path} was begun with other batches ({stats.settings}; now {settings}): remove it to begin anew"
        )
    stats.check_model(model)
    return stats
