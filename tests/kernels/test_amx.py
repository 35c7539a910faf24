"""The tile instructions themselves: the emulation runs in test_numbers.py, here the real ones are built and looked at."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from qpass.cpu import detect
from qpass.kernels.format import KernelFormat
from qpass.kernels.source import kernel_unit
from qpass.kernels.store import obtain


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.parametrize(
    ("format", "instruction"),
    [(KernelFormat(4, 128, "a8-token-group", 2), "tdpbssd"), (KernelFormat(8, None, "a8-token", 4), "tdpbsud"),
     (KernelFormat(4, 32, "a16", 2), "tdpbf16ps"), (KernelFormat(3, 16, "a8-token", 2), "tdpbssd"),
     (KernelFormat(2, 16, "a16", 2), "tdpbf16ps")],
)  # fmt: skip
def test_the_real_instructions_are_there(format: KernelFormat, instruction: str) -> None:
    path = obtain(kernel_unit(format, detect(), "amx"))
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    ).stdout
    products = [line.split(instruction)[1].split() for line in text.splitlines() if instruction in line]
    # Intel order is destination, A, B; objdump prints it reversed: B, A, destination.
    wanted = [f"%tmm{b},%tmm4,%tmm{c}" for c, b in enumerate((5, 6, 7, 5))]
    assert " ".join(wanted) in " ".join(p[0] for p in products)
    for name in ("ldtilecfg", "tileloadd", "tilestored", "tilezero", "tilerelease"):
        assert name in text, name
