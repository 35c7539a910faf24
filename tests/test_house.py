"""The house rules that a machine can hold: imports, style, types, and the size of files."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        ["lint-imports"],
        [sys.executable, "-m", "ruff", "check", "."],
        [sys.executable, "-m", "ruff", "format", "--check", "."],
        [sys.executable, "-m", "mypy"],
    ],
    ids=["imports", "lint", "format", "types"],
)
def test_tool_is_content(command: list[str]) -> None:
    program = pathlib.Path(sys.executable).parent / command[0]
    command = [str(program) if program.exists() else command[0], *command[1:]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_files_can_be_read_in_one_sitting() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for p in (ROOT / "qpass").rglob("*")
        if p.suffix in (".py", ".h", ".cpp") and (n := len(p.read_text().splitlines())) > 400
    }
    assert not long, f"over 400 lines: {long}"


def test_the_package_and_the_help_need_no_torch() -> None:
    code = "import sys, qpass, qpass.frontends.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
