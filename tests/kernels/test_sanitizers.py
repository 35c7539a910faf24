"""The kernels under the address and undefined-behavior sanitizers, with odd shapes and buffers of the exact size."""

from __future__ import annotations

import os
import pathlib
import subprocess

import pytest
from kernel_cases import SERVES, TIERS, name_of

from qpass.cpu import Tier, detect
from qpass.kernels.build import find_compiler
from qpass.kernels.format import KernelFormat
from qpass.kernels.source import HEADERS, kernel_unit

pytestmark = pytest.mark.skipif(not SERVES, reason="needs AVX2")

DRIVER = pathlib.Path(__file__).parent / "sanitized.cpp"
SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CASES = [
    (KernelFormat(4, 64, "a16", 2), "avx512_vnni"),
    (KernelFormat(8, None, "a8-token", 4), "avx512_vnni"),
    (KernelFormat(3, 16, "a8-token-group", 2), "avx512_vnni"),
    (KernelFormat(2, 32, "a8-static", 2), "avx2"),
    (KernelFormat(8, None, "a16", 4), "avx2"),
    (KernelFormat(4, 32, "a8-token-group", 2, 4), "avx512_vnni"),
    (KernelFormat(4, 128, "a8-token-group", 2), "amx"),
    (KernelFormat(4, 128, "a8-token", 1), "amx"),
    (KernelFormat(3, 16, "a8-token", 1), "avx512_vnni"),
    (KernelFormat(8, None, "a16", 4), "amx"),
]


@pytest.mark.parametrize(("unit_format", "unit_tier"), CASES, ids=[f"{name_of(f)}-{tier}" for f, tier in CASES])
def test_exact_buffers(unit_format: KernelFormat, unit_tier: Tier, tmp_path: pathlib.Path) -> None:
    if unit_tier not in TIERS:
        pytest.skip(f"this machine can't run {unit_tier}")
    unit = kernel_unit(unit_format, detect(), unit_tier, emulate=unit_tier == "amx")  # sanitizers don't see tile loads
    (tmp_path / "unit.cpp").write_text(unit.text)
    skipped = ("-O3", "-fPIC", "-shared", "-fvisibility=hidden")
    flags = [flag for flag in unit.flags if flag not in skipped]
    program = tmp_path / "sanitized"
    sources = [str(DRIVER), str(tmp_path / "unit.cpp")]
    command = [*find_compiler(), *flags, *SANITIZERS, f"-I{HEADERS}", *sources, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler comes without the sanitizers' libraries")
    assert built.returncode == 0, built.stderr[-2000:]
    # Leaks are the driver's own affair, and looking for them needs rights that containers lack.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[:3000]
    assert done.stdout == "4320 calls\n"
