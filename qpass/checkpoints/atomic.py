"""A folder that changes all at once: whoever looks sees the old one whole, or the new one whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qpass.errors import CheckpointError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def new_folder(target: Path, *, replaces: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well, and vanishes when it doesn't.

    Files of the old folder that the new one lacks are carried over (as links, or copies), except those whose names
    ``replaces`` takes: what was there under another name before. Raises CheckpointError where the folder can't be
    replaced: a file, a mount point, the root.
    """
    target = target.absolute()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; an artefact is written to a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean(target)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}-", dir=target.parent))
    try:
        yield fresh
        if target.is_dir():
            _carry_over(target, fresh, replaces)
        _flush(fresh)
        fresh.chmod(0o777 & ~_umask())
        _put_in_place(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # after an exchange this is the old folder


def _carry_over(old: Path, new: Path, replaces: Callable[[str], bool]) -> None:
    for source in old.iterdir():
        if (new / source.name).exists() or replaces(source.name):
            continue
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, new / source.name, symlinks=True)
            continue
        try:
            os.link(source, new / source.name, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(source, new / source.name, follow_symlinks=False)


def _put_in_place(fresh: Path, target: Path) -> None:
    try:
        if not target.is_dir():
            os.rename(fresh, target)
        elif not _exchange(fresh, target):
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}-", dir=target.parent))
            os.rename(target, aside)  # without an exchange in one step there is a moment without either
            os.rename(fresh, target)
            os.rename(aside, fresh)
    except OSError as error:
        raise CheckpointError(f"{target} can't be replaced: {error.strerror}") from error
    _flush_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system can't. Raises OSError."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (os.fsencode(one), os.fsencode(other))
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number))


def _flush(folder: Path) -> None:
    """On the disk before anything points to it, and readable by whom the umask lets read (safetensors writes 0600)."""
    mode = 0o666 & ~_umask()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
            path.chmod(mode | path.stat().st_mode & 0o111)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clean(target: Path) -> None:
    """Remove what killed processes left behind."""
    prefix = f".{target.name}."
    for path in target.parent.glob(f"{prefix}*-*"):
        owner = path.name.removeprefix(prefix).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
