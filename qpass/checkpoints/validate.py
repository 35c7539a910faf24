"""Foreign bytes: everything that a checkpoint claims is checked here, in Python's own integers, before it is used.

Each refusal is a CheckpointError of one sentence: file, tensor, reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

from qpass.errors import CheckpointError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}

HEADER_BYTES = 100_000_000
"""The longest header that the safetensors format allows."""

JSON_BYTES = 50_000_000
MAX_DIMENSIONS = 8


def refuse(file: str | Path, tensor: str, reason: str) -> NoReturn:
    """Raise the one kind of error that this package has."""
    raise CheckpointError(f"{file}: {tensor}: {reason}" if tensor else f"{file}: {reason}")


@dataclass(frozen=True)
class TensorInfo:
    """Where a safetensors file keeps a tensor, and what it is."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes behind the header
    end: int

    @property
    def numel_is_one(self) -> bool:
        return prod(self.shape) == 1


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file and its metadata, nothing of it believed.

    Raises CheckpointError for a truncated file, a header that is no JSON, unknown dtypes, negative or huge shapes, sizes
    that don't follow from them, tensors that overlap, leave the file or come twice, and bytes of no tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            refuse(path, "", f"has {size} bytes, too few for a safetensors file")
        length = int.from_bytes(head, "little")
        if length > min(HEADER_BYTES, size - 8):
            refuse(path, "", f"claims a header of {length} bytes, but has {size} bytes in all")
        raw = file.read(length)
    header = _json(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        refuse(path, "__metadata__", "is not a table of strings")
    infos = {name: _info(path, name, entry, size - 8 - length) for name, entry in header.items()}
    at = 0
    for info in sorted(infos.values(), key=lambda info: (info.begin, info.end)):
        if info.begin < at:
            refuse(path, info.name, "overlaps another tensor")
        if info.begin > at:
            refuse(path, info.name, f"follows {info.begin - at} bytes that belong to no tensor")
        at = info.end
    if at != size - 8 - length:
        refuse(path, "", f"ends in {size - 8 - length - at} bytes that belong to no tensor")
    return infos, metadata


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises CheckpointError for anything else, for a huge file and for a key that comes twice."""
    if not path.is_file():
        refuse(path, "", "does not exist")
    if path.stat().st_size > JSON_BYTES:
        refuse(path, "", f"has {path.stat().st_size} bytes, too many for a JSON file")
    return _json(path, path.read_bytes())


def check_files(folder: Path, names: Sequence[object], index: Path) -> list[Path]:
    """The shards that an index names, as paths inside of ``folder``.

    Raises CheckpointError for names that are no plain file names, for missing files and for links that lead out of the
    model's folder (the hub's cache, whose snapshots are links to its own blobs, is one model's folder).
    """
    files = []
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            refuse(index, repr(name), "is not the plain name of a file in the same folder")
        check_link(folder / name)
        files.append(folder / name)
    return files


def check_link(path: Path) -> None:
    """Raise CheckpointError unless ``path`` is a file, and one inside of its model's folder if it is a link."""
    home = path.parent.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent  # models--someone--name of the hub's cache
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        refuse(path, "", "does not exist")
    if not target.is_relative_to(home):
        refuse(path, "", "is a link that leads out of the model's folder")
    if not target.is_file():
        refuse(path, "", "is not a file")


def check_tensor(info: TensorInfo, dtypes: Sequence[torch.dtype], shape: Sequence[int | None]) -> None:
    """Raise CheckpointError unless a tensor has one of ``dtypes`` and ``shape``, in which None is any length from 1 on."""
    if info.dtype not in dtypes:
        accepted = " or ".join(_short(dtype) for dtype in dtypes)
        refuse(info.file, info.name, f"is {_short(info.dtype)}, where the format has {accepted}")
    wanted = [("any" if length is None else str(length)) for length in shape]
    fits = len(info.shape) == len(shape) and all(
        has == want or (want is None and has > 0) for has, want in zip(info.shape, shape, strict=True)
    )
    if not fits:
        refuse(info.file, info.name, f"has shape {list(info.shape)}, where [{', '.join(wanted)}] is needed")


def check_finite(info: TensorInfo, values: Tensor) -> None:
    """Raise CheckpointError for NaN or infinity."""
    if not bool(torch.isfinite(values.float()).all()):
        refuse(info.file, info.name, "holds NaN or infinity")


def check_number(path: Path, key: str, value: object, accepted: Sequence[int]) -> int:
    """An integer of a config. Raises CheckpointError for anything that is not in ``accepted``."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in accepted:
        refuse(path, key, f"is {value!r}; accepted: {', '.join(map(str, accepted))}")
    return value


def _info(path: Path, name: str, entry: Any, data_bytes: int) -> TensorInfo:
    if not isinstance(entry, dict):
        refuse(path, name, "has no description in the header")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        refuse(path, name, f"has the dtype {dtype!r}; accepted: {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        refuse(path, name, f"has the shape {_shown(shape)}, which is none")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(path, name, f"lies at {_shown(offsets)}, which is no range")
    begin, end = offsets
    if end > data_bytes:
        refuse(path, name, f"ends at byte {end}, but the file has {data_bytes} bytes of data")
    needed = prod(shape) * DTYPES[dtype].itemsize  # Python's integers don't overflow
    if needed != end - begin:
        refuse(path, name, f"has {end - begin} bytes, where its shape {_shown(shape)} needs {needed}")
    return TensorInfo(path, name, DTYPES[dtype], tuple(shape), begin, end)


def _naturals(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def _json(path: Path, raw: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            refuse(path, next(name for name in table if names.count(name) > 1), "comes twice")
        return table

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError):  # JSON, UTF-8 and numbers of thousands of digits
        refuse(path, "", "is not JSON where it should be")
    if not isinstance(value, dict):
        refuse(path, "", "holds no JSON object")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
