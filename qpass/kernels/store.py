"""Store: built libraries on disk, by content. What is loaded from it was written by this user and is whole.

A library's name is the hash of everything that made it (source, headers, flags, compiler), so nothing is ever stale; its
digest lies next to it and is checked before it may be loaded. Both are written under a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from qpass.errors import KernelError
from qpass.kernels.build import build, compiler_version, find_compiler
from qpass.kernels.source import Unit


def cache_folder() -> Path:
    """``$QPASS_CACHE``, else ``$XDG_CACHE_HOME/qpass``, else ``~/.cache/qpass``."""
    chosen = os.environ.get("QPASS_CACHE")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "qpass"


def open_folder(folder: Path) -> Path:
    """Create the cache folder, private to this user, or check that it is. Raises KernelError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise KernelError(f"the kernel cache {folder} can't be used: {error.strerror}; set QPASS_CACHE") from error
    _check_owner(folder, status)
    return folder


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise KernelError(f"{path} belongs to another user (uid {status.st_uid}); set QPASS_CACHE to a folder of your own")
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise KernelError(f"others may write to {path}: run chmod go-w on it, or set QPASS_CACHE to a private folder")


def identity(unit: Unit, compiler: tuple[str, ...]) -> str:
    """A hash over all that the built bytes depend on."""
    digest = hashlib.sha256()
    for part in (unit.name, unit.text, *unit.flags, *unit.libraries, *compiler, compiler_version(compiler)):
        digest.update(part.encode() + b"\0")
    for header in unit.headers:
        digest.update(header.name.encode() + b"\0" + header.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def obtain(unit: Unit, folder: Path | None = None, *, builder: Callable[[Unit, Path, tuple[str, ...]], None] = build) -> Path:
    """The path of the built unit, checked; builds it when it isn't there. Raises KernelError.

    Two processes may build the same unit at once: both succeed, and one's result stays.
    """
    folder = open_folder(folder or cache_folder())
    compiler = find_compiler()
    library = folder / f"{unit.name}-{identity(unit, compiler)}.so"
    if not library.exists() or not _digest_path(library).exists():
        _add(unit, library, compiler, builder)
    check(library)
    return library


def check(library: Path) -> None:
    """Raise KernelError unless ``library`` is this user's, writable by nobody else, and has the digest written with it."""
    try:
        _check_owner(library, library.stat())
        expected = _digest_path(library).read_text().strip()
        found = hashlib.sha256(library.read_bytes()).hexdigest()
    except OSError as error:
        raise KernelError(f"the kernel {library} can't be read: {error.strerror}") from error
    if found != expected:
        raise KernelError(f"{library} is not what was built (its digest differs): delete it, and it will be built again")


def _digest_path(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _add(unit: Unit, library: Path, compiler: tuple[str, ...], builder: Callable[[Unit, Path, tuple[str, ...]], None]) -> None:
    try:
        handle, name = tempfile.mkstemp(dir=library.parent, prefix=f".{unit.name}-", suffix=".so")
        os.close(handle)
    except OSError as error:
        raise KernelError(f"the kernel cache {library.parent} is not writable: {error.strerror}; set QPASS_CACHE") from error
    temporary = Path(name)
    try:
        builder(unit, temporary, compiler)
        temporary.chmod(0o700)
        # A compiler may not give the same bytes twice: whoever is first decides, and the digest names what is there.
        with contextlib.suppress(FileExistsError):
            os.link(temporary, library)
        digest = hashlib.sha256(library.read_bytes()).hexdigest()
        beside = temporary.with_suffix(".sha256")
        beside.write_text(digest + "\n")
        beside.replace(_digest_path(library))
    except OSError as error:
        raise KernelError(f"the kernel cache {library.parent} can't be written: {error.strerror}; set QPASS_CACHE") from error
    finally:
        temporary.unlink(missing_ok=True)
