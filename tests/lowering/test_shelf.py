"""Packed weights on disk: used again by the next process, never stale, never in the way."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qpass.algorithms.rtn import rtn
from qpass.errors import OptionError
from qpass.lowering import shelf
from qpass.lowering.generated import Generated
from qpass.lowering.given import Given, give, hash_of
from qpass.lowering.store import Packer, Scaling, WeightRef, WeightStore
from qpass.scheme import Format

FORMAT = Format(4, 64)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QPASS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / shelf.FOLDER


def _parameter(origin: str | None = "file one", n: int = 1024, seed: int = 0) -> nn.Parameter:
    weight = torch.randn(n, 1024, generator=torch.Generator().manual_seed(seed))
    parameter = nn.Parameter(weight, requires_grad=False)
    give(parameter, dataclasses.replace(Given.of(rtn(weight, FORMAT)), origin=origin))
    return parameter


def _packed(
    *parameters: nn.Parameter, packer: Packer | None = None, scaling: Scaling | None = None, glu: bool = False
) -> tuple[tuple[Tensor, ...], int]:
    """As a process that has just begun: (what is packed, how many weights were really packed)."""
    store = WeightStore(rtn)
    refs = tuple(WeightRef(p, scaling=scaling) for p in parameters)
    tensors = store.packed(refs, FORMAT, packer or Generated(), glu=glu)
    return tensors, store.packed_count


def test_the_next_process_reads_what_this_one_packed(folder: Path) -> None:
    one, two = _parameter(), _parameter("file two", seed=1)
    first, count = _packed(one, two)
    assert count == 1
    second, count = _packed(one, two)
    assert count == 0
    assert torch.equal(first[0], second[0])
    assert len(list(folder.iterdir())) == 1
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("other", ["origin", "order", "glu", "scaling", "code"])
def test_what_comes_from_elsewhere_is_packed_anew(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = _parameter(), _parameter("file two", seed=1)
    _packed(one, two)
    arguments: dict = {}
    if other == "origin":
        one = _parameter("file one, written again", seed=5)
    elif other == "order":
        one, two = two, one
    elif other == "scaling":
        arguments["scaling"] = Scaling(rows=torch.full((1024,), 2.0))
    elif other == "glu":
        arguments["glu"] = True
    else:
        monkeypatch.setattr(shelf, "_code", lambda: "another release")
    got, count = _packed(one, two, **arguments)
    assert count == 1
    monkeypatch.setenv("QPASS_PACKED_GB", "0")
    assert torch.equal(got[0], _packed(one, two, **arguments)[0][0])


class _Foreign(Generated):
    portable = False


def test_only_large_weights_of_files_in_our_own_layout_are_kept(folder: Path) -> None:
    valued = _parameter()
    give(valued, dataclasses.replace(Given.of(rtn(valued, FORMAT)), origin="file one", values=hash_of(valued)))
    assert _packed(_parameter(None))[1] == 1
    assert _packed(valued)[1] == 1  # found for values in memory, whatever file they are from
    assert _packed(_parameter(), packer=_Foreign())[1] == 1
    assert _packed(_parameter(n=64))[1] == 1
    assert not folder.exists() or not list(folder.iterdir())


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _unsigned(file: Path) -> None:
    save_file(load_file(file), file)


@pytest.mark.parametrize("harm", [_flip, _cut, _empty, _unsigned])
def test_a_damaged_file_is_replaced(folder: Path, harm: Callable[[Path], None]) -> None:
    parameter = _parameter()
    wanted, _ = _packed(parameter)
    (file,) = folder.iterdir()
    harm(file)
    got, count = _packed(parameter)
    assert count == 1
    assert torch.equal(got[0], wanted[0])
    assert _packed(parameter)[1] == 0


def test_a_shelf_that_cannot_be_used_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    assert _packed(_parameter())[1] == 1
    monkeypatch.setenv("QPASS_CACHE", str(tmp_path / "open"))
    (tmp_path / "open" / shelf.FOLDER).mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)  # others might put something there
    assert _packed(_parameter())[1] == 1
    assert not list((tmp_path / "open" / shelf.FOLDER).iterdir())


def test_the_ones_unused_for_longest_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = 1024 * 1024 // 2
    monkeypatch.setenv("QPASS_PACKED_GB", str(2.5 * sizes / 1e9))
    parameters = [_parameter(f"file {i}", seed=i) for i in range(3)]
    for age, parameter in zip((300, 200), parameters, strict=False):
        known = set(folder.iterdir()) if folder.exists() else set()
        _packed(parameter)
        (file,) = set(folder.iterdir()) - known
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - age))
    assert _packed(parameters[0])[1] == 0  # used: now it is the younger one
    assert _packed(parameters[2])[1] == 1
    assert len(list(folder.iterdir())) == 2
    assert _packed(parameters[0])[1] == 0
    assert _packed(parameters[1])[1] == 1


def test_what_a_killed_process_left_goes(folder: Path) -> None:
    _packed(_parameter())
    left, begun = folder / ".packed-left", folder / ".packed-begun"
    for path in (left, begun):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))
    _packed(_parameter("file two"))
    assert begun.exists()
    assert not left.exists()


@pytest.mark.parametrize("told", ["many", "-1", "nan", "inf"])
def test_a_size_that_is_none_is_refused(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPASS_PACKED_GB", told)
    with pytest.raises(OptionError, match="QPASS_PACKED_GB"):
        _packed(_parameter())
