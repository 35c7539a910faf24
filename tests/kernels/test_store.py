"""The kernel cache: nothing is loaded that this user didn't build, and nothing fails without saying what to do."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qpass.errors import KernelError
from qpass.kernels import build, store
from qpass.kernels.source import Unit

UNIT = Unit("tiny", 'extern "C" int answer() { return 42; }\n', ("-shared", "-fPIC"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_builds_once(folder: Path) -> None:
    calls = []

    def counting(unit: Unit, output: Path, compiler: tuple[str, ...]) -> None:
        calls.append(unit.name)
        build.build(unit, output, compiler)

    first = store.obtain(UNIT, folder, builder=counting)
    assert store.obtain(UNIT, folder, builder=counting) == first
    assert calls == ["tiny"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(p.name for p in folder.glob("*/*")) == ["unit.sha256", "unit.so"]
    assert len(list(folder.iterdir())) == 1


def test_the_name_is_the_content(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = tmp_path / "a.h"
    header.write_text("int a;")
    compiler = build.find_compiler()
    units = [
        UNIT,
        dataclasses.replace(UNIT, text=UNIT.text + " "),
        dataclasses.replace(UNIT, flags=(*UNIT.flags, "-O1")),
        dataclasses.replace(UNIT, headers=(header,)),
    ]
    names = [store.identity(unit, compiler) for unit in units]
    header.write_text("int b;")
    names.append(store.identity(units[3], compiler))
    names.append(store.identity(UNIT, (*compiler, "-g")))
    monkeypatch.setattr(store, "compiler_version", lambda compiler: "another")
    names.append(store.identity(UNIT, compiler))
    assert len(set(names)) == len(names)


def test_a_changed_library_is_refused(folder: Path) -> None:
    path = store.obtain(UNIT, folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(KernelError, match=r"not what was built.*delete .*built again"):
        store.obtain(UNIT, folder)
    shutil.rmtree(path.parent)
    assert store.obtain(UNIT, folder) == path


def test_a_lost_digest_is_no_way_in(folder: Path) -> None:
    path = store.obtain(UNIT, folder)
    path.with_suffix(".sha256").unlink()
    path.write_bytes(b"planted")
    with pytest.raises(KernelError, match=r"can't be checked: No such file.*unit\.sha256; delete"):
        store.obtain(UNIT, folder)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_that_others_may_write_to_is_refused(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(KernelError, match=r"others may write to .*chmod"):
        store.obtain(UNIT, folder)


def test_a_library_that_others_may_write_to_is_refused(folder: Path) -> None:
    store.obtain(UNIT, folder).chmod(0o766)
    with pytest.raises(KernelError, match="others may write"):
        store.obtain(UNIT, folder)


def test_a_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(KernelError, match="belongs to another user"):
        store.obtain(UNIT, folder)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelError, match=r"can't be used.*QPASS_CACHE"):
        store.obtain(UNIT, tmp_path / "file" / "cache")


def test_a_read_only_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o500)

    def refused(*args: object, **kwargs: object) -> object:  # root may write anywhere, so the mode alone proves nothing
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store.tempfile, "mkdtemp", refused)
    with pytest.raises(KernelError, match="not writable: Permission denied; set QPASS_CACHE"):
        store.obtain(UNIT, folder)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match=r"no C\+\+ compiler was found"):
        build.find_compiler()
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    with pytest.raises(KernelError, match="/nowhere/g"):
        build.find_compiler()


def test_what_does_not_compile(folder: Path) -> None:
    with pytest.raises(KernelError, match=r"did not compile.*error.*the command was: .*broken.cpp"):
        store.obtain(Unit("broken", "int f( {", ("-shared", "-fPIC")), folder)
    assert list(folder.iterdir()) == []


def test_the_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPASS_CACHE", "/a")
    assert store.cache_folder() == Path("/a")
    monkeypatch.delenv("QPASS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert store.cache_folder() == Path("/b/qpass")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert store.cache_folder() == Path("/c/.cache/qpass")


def test_two_processes_at_once(folder: Path) -> None:
    code = (
        "import ctypes, pathlib, sys; from qpass.kernels.source import Unit; from qpass.kernels.store import obtain\n"
        f"unit = Unit({UNIT.name!r}, {UNIT.text!r}, {UNIT.flags!r})\n"
        "print(ctypes.CDLL(str(obtain(unit, pathlib.Path(sys.argv[1])))).answer())"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE) for _ in range(4)]
    assert [process.communicate(timeout=120)[0] for process in processes] == [b"42\n"] * 4
    assert sorted(p.name for p in folder.glob("*/*")) == ["unit.sha256", "unit.so"]
    assert len(list(folder.iterdir())) == 1


def test_who_comes_second_waits(folder: Path) -> None:
    """Four want one unit: it is built once, and a builder that fails lets the next one try."""
    built: list[int] = []

    def builder(unit: Unit, library: Path, compiler: tuple[str, ...]) -> None:
        built.append(len(built))
        time.sleep(0.2)
        if built[-1] == 0:
            raise KernelError("the first one fails")
        _write(unit, library, compiler)

    def want(_: int) -> object:
        try:
            return store.obtain(UNIT, folder, builder=builder)
        except KernelError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(want, range(4)))
    assert len(built) == 2
    assert found.count("the first one fails") == 1
    assert len(set(map(str, found))) == 2
    assert not list(folder.glob(".*"))


def test_the_cache_is_bounded(folder: Path) -> None:
    units = [dataclasses.replace(UNIT, name=f"tiny{i}") for i in range(4)]
    homes = [store.obtain(unit, folder, builder=_write).parent for unit in units]
    for age, home in zip((4, 3, 2, 1), homes, strict=True):
        os.utime(home, (1e9 - age, 1e9 - age))
    store.obtain(units[0], folder, builder=_write)  # used again: no longer the oldest
    assert store.prune(folder, most=2, kept_seconds=0) == 2
    assert [home.exists() for home in homes] == [True, False, False, True]
    assert store.prune(folder, most=0) == 1  # the one that was just used may be about to be opened
    assert homes[0].exists()


def _write(unit: Unit, output: Path, compiler: tuple[str, ...]) -> None:
    output.write_bytes(unit.name.encode())
