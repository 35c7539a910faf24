"""Build: run the C++ compiler on a unit. Raises KernelError with the command and the compiler's first words."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from qpass.errors import KernelError
from qpass.kernels.source import HEADERS, Unit

_TIMEOUT_S = 300


def find_compiler() -> tuple[str, ...]:
    """``$CXX`` (which may carry arguments), else g++, c++ or clang++. Raises KernelError where there is none."""
    chosen = os.environ.get("CXX")
    if chosen:
        words = tuple(shlex.split(chosen))
        if not words or shutil.which(words[0]) is None:
            raise KernelError(f"the C++ compiler CXX={chosen!r} was not found")
        return words
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return (name,)
    raise KernelError(
        "no C++ compiler was found (g++, c++ or clang++ on PATH, or $CXX): the generated kernels need one"
    )


def compiler_version(compiler: tuple[str, ...]) -> str:
    """The first line of ``--version``: part of a built unit's identity."""
    return _version(compiler, shutil.which(compiler[0]) or compiler[0])


@cache
def _version(compiler: tuple[str, ...], path: str) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"{path} --version failed: {error}") from error
    return done.stdout.partition("\n")[0]


def build(unit: Unit, output: Path, compiler: tuple[str, ...]) -> None:
    """Compile ``unit`` into the shared library ``output``."""
    with tempfile.TemporaryDirectory(prefix="qpass-") as folder:
        source = Path(folder) / f"{unit.name}.cpp"
        source.write_text(unit.text)
        command = [*compiler, *unit.flags, f"-I{HEADERS}", str(source), "-o", str(output), *unit.libraries]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelError(f"the compiler could not run: {error}; the command was: {shlex.join(command)}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        errors = [line for line in lines if "error" in line][:5] or lines[:5]
        raise KernelError(
            f"the kernel {unit.name} did not compile (exit {done.returncode}): {'; '.join(errors) or 'no message'}; "
            f"the command was: {shlex.join(command)}"
        )
