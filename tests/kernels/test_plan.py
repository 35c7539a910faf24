"""Formats by number, sizes, and the numbers that Python and the C header share."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys

import pytest
from kernel_cases import FORMATS, SERVES, name_of

from qpass.cpu import Cpu, detect
from qpass.kernels import load, plan
from qpass.kernels.plan import KernelFormat, Shape
from qpass.kernels.source import HEADERS, kernel_unit
from qpass.kernels.store import obtain
from qpass.ops.epilogue import ACTIVATIONS


def all_formats() -> list[KernelFormat]:
    found = []
    for number in range(64):
        try:
            found.append(KernelFormat.of(number))
        except ValueError:
            continue
    return found


def test_a_format_and_its_number_are_one_to_one() -> None:
    formats = all_formats()
    assert len(formats) == len(set(formats)) == 44
    assert all(KernelFormat.of(format.number) == format for format in formats)
    assert set(FORMATS) <= set(formats)


def test_numbers_never_change() -> None:
    """Inductor's caches hold them."""
    assert KernelFormat(4, 128, "a16", 2).number == 6
    assert KernelFormat(4, 128, "a8-token-group", 2).number == 22
    assert KernelFormat(4, 32, "a8-token-group", 4).number == 50
    assert KernelFormat(8, None, "a16", 4).number == 33
    assert KernelFormat(8, None, "a8-token", 4).number == 41


@pytest.mark.parametrize("number", [-1, 64, 24, 1000])
def test_a_number_without_meaning_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="is no format"):
        KernelFormat.of(number)


@pytest.mark.parametrize(
    ("bits", "group", "rule", "scale_bytes"),
    [(3, 32, "a16", 2), (4, 48, "a16", 2), (4, 32, "a4", 2), (4, 32, "a16", 1), (8, None, "a8-token-group", 4)],
)
def test_a_format_that_no_kernel_has(bits: int, group: int | None, rule: str, scale_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"no kernel has|one scale a token"):
        KernelFormat(bits, group, rule, scale_bytes)


def test_the_header_has_the_same_numbers() -> None:
    header = (HEADERS / "abi.h").read_text()
    values = {name: int(value) for name, value in re.findall(r"(QPASS_\w+) = (\d+)", header)}
    names = [f"QPASS_{name.upper()}" for name in plan.ACTIVATIONS]
    assert [values[name] for name in names] == list(range(5))
    assert list(ACTIVATIONS) == list(plan.ACTIVATIONS)
    rules = [values["QPASS_" + rule.upper().replace("-", "_")] for rule in ("a16", "a8-token", "a8-token-group")]
    assert rules == [0, 1, 2]


class _Table(ctypes.Structure):
    _fields_ = (
        ("abi", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("packed_bytes", ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32)),
    )


@pytest.mark.skipif(not SERVES, reason="needs AVX-512 VNNI")
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_python_and_c_agree_on_the_size(format: KernelFormat) -> None:
    library = load._open(obtain(kernel_unit(format, detect(), "avx512_vnni")))
    library.qpass_kernel.restype = ctypes.POINTER(_Table)
    table = library.qpass_kernel().contents
    assert table.format == format.number
    for n, k, glu in ((1, 1, False), (64, 128, False), (65, 129, False), (2, 33, True), (130, 391, True)):
        assert table.packed_bytes(n, k, glu) == format.packed_bytes(n, k, glu)


def test_sums_that_could_overflow_are_refused() -> None:
    channel = KernelFormat(8, None, "a8-token", 4)
    assert plan.refuse(channel, 66304) is None  # 255 * 127 * K is just below 2^31
    assert "overflow" in str(plan.refuse(channel, 66368))
    assert plan.refuse(KernelFormat(8, 128, "a8-token", 2), 1 << 20) is None
    assert plan.refuse(KernelFormat(8, None, "a16", 4), 1 << 20) is None


def test_plan_names_the_path() -> None:
    vnni = Cpu("x", "y", plan_isa("avx512_vnni"), 2)
    amx = Cpu("x", "y", plan_isa("amx"), 2, amx_permitted=True)
    a16, a8, w8a8 = (
        KernelFormat(4, 128, "a16", 2),
        KernelFormat(4, 128, "a8-token-group", 2),
        KernelFormat(8, None, "a8-token", 4),
    )
    assert [plan.plan(Shape(m, 64, 128), a16, vnni).path for m in (1, 60, 61)] == ["stream", "stream", "panel"]
    assert [plan.plan(Shape(m, 64, 128), w8a8, vnni).path for m in (1, 64)] == ["stream", "stream"]
    assert [plan.plan(Shape(m, 64, 128), a16, amx).path for m in (1, 64, 65)] == ["stream", "panel", "tiles"]
    assert [plan.plan(Shape(m, 64, 128), a8, amx).path for m in (1, 4, 5)] == ["stream", "stream", "tiles"]
    assert plan.plan(Shape(1, 64, 128), a16, vnni).weight_bytes == 64 * 64 + 128 + 64
    with pytest.raises(ValueError, match="tier none"):
        plan.plan(Shape(1, 64, 128), a16, Cpu("x", "y", frozenset(), 2))


def plan_isa(tier: str) -> frozenset[str]:
    from qpass.cpu import _NEEDS, TIERS

    return frozenset().union(*(_NEEDS[t] for t in TIERS[: TIERS.index(tier) + 1]))


def test_no_torch_in_plan_source_build_store() -> None:
    code = "import sys, qpass.kernels.plan, qpass.kernels.source, qpass.kernels.build, qpass.kernels.store, qpass.cpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_header_unpacks_from_the_same_row_on() -> None:
    found = re.search(r"constexpr int panel_rows = Bits == 4 \? (\d+) : (\d+);", (HEADERS / "layout.h").read_text())
    assert found is not None
    assert {4: int(found[1]), 8: int(found[2])} == plan.PANEL_ROWS
