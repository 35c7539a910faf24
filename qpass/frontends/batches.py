"""What a model is calibrated on, from whatever the user has: text, token ids, a DataLoader, any iterable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpass.errors import OptionError
from qpass.measure.corpus import read_text, windows

Batch = dict[str, Any]
"""Keyword arguments of the model's forward: ``input_ids`` int64 [B, length] at least."""


def read_batches(
    source: Any, tokenizer: Any = None, *, length: int = 512, count: int | None = 64, batch: int = 1
) -> Iterator[Batch]:
    """Batches for a model's forward, one after the other; at most ``count`` of them where that is a number.

    source  None: the standard library's source; a path: the text of a file or folder (both cut into ``count`` windows of
            ``length`` tokens, evenly spread, and need a tokenizer); an int64 tensor [n, length]; a DataLoader or any
            iterable of int64 tensors [length] or [B, length], of mappings such as a tokenizer makes, or of strings

    Raises OptionError for anything else, at the batch that is wrong; the first one is read at once.
    """
    batches = _rows(source, tokenizer, length, count, batch)
    first = next(batches, None)
    if first is None:
        raise OptionError("the calibration set is empty")
    return islice(_and(first, batches), count)


def _and(first: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    yield first
    yield from rest


def _rows(source: Any, tokenizer: Any, length: int, count: int | None, batch: int) -> Iterator[Batch]:
    if source is None or isinstance(source, str | Path):
        if tokenizer is None:
            raise OptionError("text needs a tokenizer: pass tokenizer=, or token ids in the place of text")
        text = read_text(None if source is None else Path(source), "calibration")
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
        source = windows(ids, length, None if count is None else count * batch)
    if isinstance(source, Tensor):
        ids = _ids(source, "the tensor of token ids")
        for start in range(0, len(ids), batch):
            yield {"input_ids": ids[start : start + batch]}
        return
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise OptionError(
            "batches are a path of text, an int64 tensor of token ids, a DataLoader or an iterable of tensors, mappings "
            f"or strings, not {type(source).__name__}"
        )
    for index, item in enumerate(source):
        yield _batch(item, f"batch {index}", tokenizer, length)


def _batch(item: Any, what: str, tokenizer: Any, length: int) -> Batch:
    if isinstance(item, str):
        if tokenizer is None:
            raise OptionError(f"{what} is a string, which needs a tokenizer: pass tokenizer=")
        item = tokenizer(item, return_tensors="pt", truncation=True, max_length=length).input_ids
    if isinstance(item, Tensor):
        return {"input_ids": _ids(item, what)}
    if (
        isinstance(item, list | tuple) and len(item) == 1 and isinstance(item[0], Tensor)
    ):  # as a TensorDataset gives them
        return {"input_ids": _ids(item[0], what)}
    if not isinstance(item, Mapping):
        raise OptionError(
            f"{what} is a {type(item).__name__}; accepted: an int64 tensor, a mapping with input_ids, a string"
        )
    if "input_ids" not in item:
        raise OptionError(f"{what} is a mapping without input_ids (it has {', '.join(map(str, item)) or 'nothing'})")
    return {**item, "input_ids": _ids(torch.as_tensor(item["input_ids"]), f"{what}: input_ids")}


def _ids(ids: Tensor, what: str) -> Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise OptionError(f"{what} must hold token ids (int64), not {ids.dtype}")
    if ids.device.type != "cpu":
        raise OptionError(f"{what} is on {ids.device}; qpass works on the CPU: move it with .cpu()")
    if ids.dim() not in (1, 2) or ids.numel() == 0:
        raise OptionError(f"{what} must be [length] or [batch, length] and not empty, not {list(ids.shape)}")
    return ids.long().reshape(-1, ids.shape[-1])
