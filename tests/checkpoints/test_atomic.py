"""A folder changes all at once, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qpass.checkpoints import atomic
from qpass.checkpoints.atomic import new_folder
from qpass.errors import CheckpointError


def _write(target: Path, text: str) -> None:
    with new_folder(target, replaces=lambda name: name.endswith(".weights")) as folder:
        (folder / "config").write_text(text)
        (folder / "config").chmod(0o600)
        (folder / f"{text}.weights").write_text(text)


def _seen(target: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in target.iterdir()}


@pytest.mark.parametrize("exchange", [True, False])
def test_new_weights_replace_old_ones_and_the_rest_stays(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "model"
    _write(target, "a")
    (target / "tokenizer").write_text("t")
    _write(target, "b")
    assert _seen(target) == {"config": "b", "b.weights": "b", "tokenizer": "t"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~atomic._umask()
    assert (target / "config").stat().st_mode & 0o777 == 0o666 & ~atomic._umask()


def test_interrupted_the_old_one_stands(tmp_path: Path) -> None:
    target = tmp_path / "model"
    _write(target, "a")

    def interrupted() -> None:
        with new_folder(target) as folder:
            (folder / "config").write_text("b")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert _seen(target) == {"config": "a", "a.weights": "a"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_killed_the_old_one_stands_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "model"
    _write(target, "a")
    code = (
        "import os, sys, pathlib\nfrom qpass.checkpoints.atomic import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'config').write_text('b'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == 9
    assert _seen(target)["config"] == "a"
    assert len(list(tmp_path.iterdir())) == 2
    _write(target, "c")
    assert _seen(target)["config"] == "c"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(CheckpointError, match="is a file"), new_folder(tmp_path / "model"):
        pass


def test_links_are_carried_over_as_links(tmp_path: Path) -> None:
    target = tmp_path / "model"
    _write(target, "a")
    os.symlink("config", target / "link")
    _write(target, "b")
    assert (target / "link").is_symlink()
