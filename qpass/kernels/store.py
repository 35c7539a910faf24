"""Store: built libraries on disk, by content. What is loaded from it was written by this user and is whole.

A library lies in a folder named by the hash of everything that made it (source, headers, flags, compiler), so nothing is ever
stale; its digest lies next to it and is checked before it may be loaded. The folder is filled under a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from qpass.errors import KernelError
from qpass.kernels.build import build, compiler_version, find_compiler
from qpass.kernels.source import Unit

_LIBRARY, _DIGEST = "unit.so", "unit.sha256"

MOST_UNITS = 512
"""A unit takes 50 to 200 KB; a model needs two or three. Beyond this number the ones unused for longest go."""

KEPT_SECONDS = 3600
"""A unit that was used this recently stays: another process may be about to open it."""


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


def keep(path: Path, values: Mapping[str, float]) -> None:
    """Write ``values`` to ``path``, CACHE/FOLDER/NAME.json; a reader never sees half of it. Raises KernelError."""
    folder = open_folder(path.parent.parent)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(values, file)
        os.replace(file.name, path)
    except OSError as error:
        raise KernelError(f"the kernel cache {folder} can't be written: {error.strerror}; set QPASS_CACHE") from error


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise KernelError(
            f"{path} belongs to another user (uid {status.st_uid}); set QPASS_CACHE to a folder of your own"
        )
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


def obtain(
    unit: Unit, folder: Path | None = None, *, builder: Callable[[Unit, Path, tuple[str, ...]], None] = build
) -> Path:
    """The path of the built unit, checked; builds it when it isn't there. Raises KernelError.

    Of two processes that want the same unit at once one builds it while the other waits; where files can't be locked both
    build, and the first one's result stays.
    """
    folder = open_folder(folder or cache_folder())
    compiler = find_compiler()
    home = folder / f"{unit.name}-{identity(unit, compiler)}"
    if not home.exists():
        with _one_at_a_time(home):
            if not home.exists():
                _add(unit, home, compiler, builder)
        prune(folder)
    check(home / _LIBRARY)
    with contextlib.suppress(OSError):  # a read-only cache serves, it only can't tell what is in use
        os.utime(home)
    return home / _LIBRARY


@contextlib.contextmanager
def _one_at_a_time(home: Path) -> Iterator[None]:
    """Hold the lock of a unit that isn't there yet. It ends with the process that holds it, so nobody waits for a dead one."""
    lock = home.parent / f".{home.name}.lock"
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # a folder that can't be written to is refused by who builds
            file = held.enter_context(lock.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
            held.callback(lock.unlink, missing_ok=True)
        yield


def prune(folder: Path, most: int = MOST_UNITS, kept_seconds: float = KEPT_SECONDS) -> int:
    """Delete the units unused for longest until ``most`` are left; returns how many went. One in use stays loaded."""
    units = []
    for digest in folder.glob(f"*/{_DIGEST}"):
        with contextlib.suppress(OSError):
            units.append((digest.parent.stat().st_mtime, digest.parent))
    oldest = [unit for used, unit in sorted(units)[: max(0, len(units) - most)] if used < time.time() - kept_seconds]
    for unit in oldest:
        shutil.rmtree(unit, ignore_errors=True)
    return len(oldest)


def check(library: Path) -> None:
    """Raise KernelError unless ``library`` is this user's, writable by nobody else, and has the digest written with it."""
    try:
        for path in (library.parent, library):
            _check_owner(path, path.stat())
        expected = (library.parent / _DIGEST).read_text().strip()
        found = hashlib.sha256(library.read_bytes()).hexdigest()
    except OSError as error:
        raise KernelError(
            f"the kernel {library} can't be checked: {error.strerror}: {error.filename}; delete {library.parent}"
        ) from error
    if found != expected:
        raise KernelError(
            f"{library} is not what was built (its digest differs): delete {library.parent}, and it will be built again"
        )


def _add(
    unit: Unit, home: Path, compiler: tuple[str, ...], builder: Callable[[Unit, Path, tuple[str, ...]], None]
) -> None:
    try:
        temporary = Path(tempfile.mkdtemp(dir=home.parent, prefix=f".{unit.name}-"))  # mode 0700
    except OSError as error:
        raise KernelError(
            f"the kernel cache {home.parent} is not writable: {error.strerror}; set QPASS_CACHE"
        ) from error
    try:
        library = temporary / _LIBRARY
        builder(unit, library, compiler)
        library.chmod(0o700)
        (temporary / _DIGEST).write_text(hashlib.sha256(library.read_bytes()).hexdigest() + "\n")
        try:
            temporary.rename(home)  # library and digest at once; fails when another process was first
        except OSError:
            if not home.exists():
                raise
    except OSError as error:
        raise KernelError(
            f"the kernel cache {home.parent} can't be written: {error.strerror}; set QPASS_CACHE"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
