"""Formats by number, sizes, and the numbers that Python and the C header share."""

from __future__ import annotations

import ctypes
import re

import pytest
from kernel_cases import CPU, FORMATS, SERVES, name_of

from qpass.kernels import load, plan
from qpass.kernels.format import NUMBERS, RULES, KernelFormat
from qpass.kernels.source import HEADERS, kernel_unit
from qpass.kernels.store import obtain
from qpass.ops.epilogue import ACTIVATIONS


def all_formats() -> list[KernelFormat]:
    found = []
    for number in range(NUMBERS):
        try:
            found.append(KernelFormat.of(number))
        except ValueError:
            continue
    return found


def test_a_format_and_its_number_are_one_to_one() -> None:
    formats = all_formats()
    plain = 4 * (5 * 4 - 1) * 2 * 2  # per channel has no scale a token and group
    assert len(formats) == len(set(formats)) == plain + 3 * 4 * 2  # integer scales: fewer bits, groups, two rules
    assert all(KernelFormat.of(format.number) == format for format in formats)
    assert set(FORMATS) <= set(formats)


def test_numbers_never_change() -> None:
    """Inductor's caches hold them."""
    assert KernelFormat(4, 128, "a16", 2).number == 6
    assert KernelFormat(4, 128, "a8-token-group", 2).number == 22
    assert KernelFormat(4, 32, "a8-token-group", 4).number == 50
    assert KernelFormat(8, None, "a16", 4).number == 33
    assert KernelFormat(8, None, "a8-token", 4).number == 41
    assert KernelFormat(8, None, "a8-static", 4).number == 57
    assert KernelFormat(4, 16, "a16", 2).number == 64
    assert KernelFormat(2, 32, "a16", 2).number == 130
    assert KernelFormat(3, 64, "a8-token-group", 2).number == 149
    assert KernelFormat(4, 32, "a16", 2, 4).number == 258
    assert KernelFormat(4, 128, "a8-token", 1).number == 526


@pytest.mark.parametrize("number", [-1, 16, 66, 272, 512, 518, 526 + 256, 526 + 32, 1023, 1 << 40])
def test_a_number_without_meaning_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="is no format"):
        KernelFormat.of(number)


@pytest.mark.parametrize(
    ("bits", "group", "rule", "scale_bytes"),
    [
        (5, 32, "a16", 2),
        (16, 32, "a16", 2),
        (4, 48, "a16", 2),
        (4, 8, "a16", 2),
        (4, 0, "a16", 2),
        (4, 32, "a4", 2),
        (4, 32, "a16", 1),
        (8, None, "a8-token-group", 4),
    ],
)
def test_a_format_that_no_kernel_has(bits: int, group: int | None, rule: str, scale_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"no kernel has|one scale a token"):
        KernelFormat(bits, group, rule, scale_bytes)


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_no_bit_is_wasted(format: KernelFormat) -> None:
    """Codes of whole groups take exactly their bits: three words of 32 for 32 codes of 3 bits."""
    groups = 4
    k = groups * (format.group or 64)
    tail = format.groups(k) * 64 * (format.scale_bytes + 1)
    assert format.packed_bytes(64, k) == 64 * k * format.bits // 8 + tail


def test_the_header_has_the_same_numbers() -> None:
    header = (HEADERS / "abi.h").read_text()
    values = {name: int(value) for name, value in re.findall(r"(QPASS_\w+) = (\d+)", header)}
    names = [f"QPASS_{name.upper()}" for name in plan.ACTIVATIONS]
    assert [values[name] for name in names] == list(range(5))
    assert list(ACTIVATIONS) == list(plan.ACTIVATIONS)
    assert [values["QPASS_" + rule.upper().replace("-", "_")] for rule in RULES] == [0, 1, 2, 3]


class _Table(ctypes.Structure):
    _fields_ = (
        ("abi", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("rule", ctypes.c_int32),
        ("packed_bytes", ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32)),
    )


@pytest.mark.skipif(not SERVES, reason="needs AVX2")
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_python_and_c_agree_on_the_size(format: KernelFormat) -> None:
    library = load.open_library(obtain(kernel_unit(format, CPU)))
    library.qpass_kernel.restype = ctypes.POINTER(_Table)
    table = library.qpass_kernel().contents
    assert (table.format, table.rule) == (format.number, RULES.index(format.rule))
    for n, k, glu in ((1, 1, False), (64, 128, False), (65, 129, False), (2, 33, True), (130, 391, True)):
        assert table.packed_bytes(n, k, glu) == format.packed_bytes(n, k, glu)


def test_a_unit_knows_its_headers() -> None:
    """All that the compiler reads, for every tier, and no other unit's: they are part of a built unit's identity."""
    names = {path.name for path in kernel_unit(FORMATS[0], CPU, "avx512_vnni").headers}
    assert {"kernel.h", "abi.h", "layout.h", "isa_avx2.h", "isa_avx512.h", "isa_amx.h", "simd_avx2.h"} <= names
    assert not {name for name in names if name.startswith(("attention", "binding"))}
