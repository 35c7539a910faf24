"""The shelf: packed weights of stored checkpoints as files, so that the next process reads what this one unpacked and packed.

A weight's name is a hash of all that its packed form comes from: the checkpoint's files (path, size, time of change), the layer,
the config, the format, the packer and the source of this code. So nothing on the shelf is ever stale; what isn't asked
for any more is deleted once the shelf is full. Files are whole or not there, private to this user, and checked when read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qpass.errors import KernelError, OptionError
from qpass.kernels.pack import empty_packed
from qpass.kernels.store import cache_folder, open_folder

FOLDER = "packed"
MOST_GB = 16
"""By default: several models of seven billion weights in four bits. ``$QPASS_PACKED_GB`` says otherwise, 0 for no shelf."""

SMALLEST = 1 << 18
"""Bytes. Less is packed sooner than a file is opened."""

_TEMPORARY = ".packed-"
_ABANDONED_S = 3600  # no file takes an hour to write
_DIGEST = "sha256"
_SOURCES = ("checkpoints/*.py", "kernels/pack.py", "kernels/format.py", "lowering/store.py", "qweight.py")


def name_of(*parts: object) -> str:
    """One name for packed tensors that come from ``parts`` (anything JSON holds) by this code."""
    text = json.dumps([_code(), *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def obtain(name: str, size: int, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What lies on the shelf under ``name``, else what ``make`` makes, which is put there; ``size`` is its bytes or a guess.

    A shelf that can't be used is no error: the weight is packed, as it is without one. Raises OptionError for a
    ``$QPASS_PACKED_GB`` that is no number.
    """
    most = _most_bytes()
    if most < size or size < SMALLEST:
        return make()
    try:
        folder = open_folder(open_folder(cache_folder()) / FOLDER)
    except KernelError:
        return make()
    file = folder / f"{name}.safetensors"
    found = _read(file)
    if found is None:
        found = make()
        with contextlib.suppress(OSError):
            _write(file, found)
            prune(folder, most, keep=file)
    return found


def prune(folder: Path, most: int, keep: Path | None = None) -> int:
    """Delete the files unused for longest until ``most`` bytes are left, never ``keep``; returns how many went.

    What a killed process left half-written goes with them.
    """
    for path in folder.glob(_TEMPORARY + "*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - _ABANDONED_S:
                path.unlink()
    files = []
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):
            status = path.stat()
            files.append((status.st_mtime, status.st_size, path))
    total, gone = sum(size for _, size, _ in files), 0
    for _, size, path in sorted(files):
        if total <= most:
            break
        if path != keep:
            path.unlink(missing_ok=True)
            total, gone = total - size, gone + 1
    return gone


def _read(file: Path) -> tuple[Tensor, ...] | None:
    """The tensors, in memory of their own (streaming wants large pages, which mapped files don't have); None for a damaged file."""
    try:
        status = file.stat()
        if status.st_uid != os.geteuid():
            return None
        with safe_open(str(file), framework="pt") as stored:
            tensors = []
            for name in sorted(stored.keys(), key=int):
                mapped = stored.get_tensor(name)
                tensors.append(empty_packed(mapped.shape, mapped.dtype).copy_(mapped))
            if _digest(tensors) != (stored.metadata() or {}).get(_DIGEST):
                raise SafetensorError("another digest")
        os.utime(file)  # in use
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError):
        with contextlib.suppress(OSError):
            file.unlink()
        return None
    return tuple(tensors)


def _write(file: Path, tensors: tuple[Tensor, ...]) -> None:
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=_TEMPORARY)
    os.close(handle)
    try:
        save_file({str(i): t for i, t in enumerate(tensors)}, temporary, metadata={_DIGEST: _digest(list(tensors))})
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _most_bytes() -> int:
    told = os.environ.get("QPASS_PACKED_GB", "")
    try:
        gigabytes = float(told) if told else MOST_GB
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < 1e6:
        raise OptionError(f"QPASS_PACKED_GB={told!r} is no number of gigabytes; 0 keeps no packed weights")
    return int(gigabytes * 1e9)


@functools.cache
def _code() -> str:
    """A hash of the code between a checkpoint's bytes and the packed ones."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(root.glob(pattern)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
