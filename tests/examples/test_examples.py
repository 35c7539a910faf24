"""Every example runs, on the demo's model where it takes one, and stays short."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

EXAMPLES = sorted((pathlib.Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: pathlib.Path, demo_model: pathlib.Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 60
    arguments = [str(demo_model)] if "[MODEL]" in source else []
    result = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip()


def test_first_example_knows_the_capital(demo_model: pathlib.Path) -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES[0]), str(demo_model)], capture_output=True, text=True, timeout=600
    )
    assert "Paris" in result.stdout
