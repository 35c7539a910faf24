"""Source: the translation unit of one kernel. It holds only what depends on the format; the rest is in ``cpp/``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qpass.cpu import Cpu, Tier
from qpass.kernels.format import KernelFormat
from qpass.kernels.plan import Blocking, a16_by_int8, blocking

HEADERS = Path(__file__).parent / "cpp"

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_AVX512_VNNI = (*_AVX512, "-mavx512vnni")

_TIER_FLAGS: dict[Tier, tuple[str, ...]] = {
    "avx2": _AVX2,
    "avx_vnni": (*_AVX2, "-DQPASS_AVX_VNNI"),
    "avx512": _AVX512,
    "avx512_vnni": _AVX512_VNNI,
    "amx": (*_AVX512_VNNI, "-mavx512bf16", "-DQPASS_AMX"),
}

_EXTRAS = {"avx512_bf16": "-mavx512bf16", "avx512vbmi": "-mavx512vbmi", "gfni": "-mgfni"}
"""Flags of what a CPU may have beyond AVX-512 VNNI."""

COMMON_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # every fused multiply-add is one that the source spells
    "-fno-math-errno",
    "-fno-exceptions",
    "-fno-rtti",
)


@dataclass(frozen=True)
class Unit:
    """One shared library to build: its text, the compiler's flags, and the headers that are part of its identity."""

    name: str
    text: str
    flags: tuple[str, ...]
    headers: tuple[Path, ...] = ()
    libraries: tuple[str, ...] = ()  # behind the source on the command line


def kernel_unit(format: KernelFormat, cpu: Cpu, tier: Tier | None = None, *, emulate: bool = False) -> Unit:
    """The unit of one format for one tier (the machine's own by default). Pure.

    ``emulate`` is for tests on a machine without the tier: plain C++ in place of the tile instructions (amx), AVX-512's
    encoding of the same dot product (avx_vnni).
    """
    tier = tier or cpu.tier
    flags = tier_flags(cpu, tier)
    if emulate:
        flags.append(f"-DQPASS_{tier.upper()}_EMULATED")
        if "avx512_bf16" not in cpu.isa and "-mavx512bf16" in flags:
            flags.remove("-mavx512bf16")
    text = _text(format, blocking(cpu), a16_by_int8(format, cpu, tier))
    return Unit(f"{format.name}-{tier}", text, (*COMMON_FLAGS, *flags), included("kernel.h"))


@cache
def included(name: str) -> tuple[Path, ...]:
    """The file and all headers that it includes, whatever the macros: edits of others don't rebuild its units."""
    found, rest = [], [name]
    while rest:
        name = rest.pop()
        if name not in found:
            found.append(name)
            rest += re.findall(r'^#include "(.+)"$', (HEADERS / name).read_text(), re.MULTILINE)
    return tuple(HEADERS / name for name in sorted(found))


def extras(cpu: Cpu, tier: Tier) -> tuple[str, ...]:
    """What the CPU has beyond the tier's needs and the kernels use."""
    return tuple(name for name in _EXTRAS if name in cpu.isa) if tier in ("avx512_vnni", "amx") else ()


def tier_flags(cpu: Cpu, tier: Tier) -> list[str]:
    """The compiler's flags for a tier, and for what this CPU has beyond it. Raises ValueError for a tier without kernels."""
    if tier not in _TIER_FLAGS:
        raise ValueError(f"there are no kernels for tier {tier}")
    return list(dict.fromkeys((*_TIER_FLAGS[tier], *(_EXTRAS[name] for name in extras(cpu, tier)))))


def rates_unit(cpu: Cpu) -> Unit:
    """The unit that measures what this machine reaches at most."""
    text, headers = (HEADERS / "rates.cpp").read_text(), included("rates.cpp")
    return Unit(f"rates-{cpu.tier}", text, (*COMMON_FLAGS, *tier_flags(cpu, cpu.tier)), headers)


def _text(format: KernelFormat, blocking: Blocking, by_int8: bool) -> str:
    rule = "QPASS_" + format.rule.upper().replace("-", "_")
    return (
        f"#define QPASS_TASK_ROWS {blocking.task_rows}\n"
        f"#define QPASS_PREFETCH_BYTES {blocking.prefetch_bytes}\n"
        f"#define QPASS_PREFETCH_PAGES {blocking.prefetch_pages}\n"
        f"#define QPASS_A16_BY_INT8 {int(by_int8)}\n"
        f'#include "kernel.h"\n'
        f"QPASS_DEFINE_KERNEL({format.number}, {format.bits}, {format.group or 0}, {rule}, {format.scale_bytes}, {format.zero_bytes})\n"
    )


def binding_unit(include: tuple[str, ...], library: tuple[str, ...], name: str = "binding") -> Unit:
    """The unit of ``cpp/<name>.cpp``, which registers native ops with torch; the caller knows torch's folders."""
    flags = (
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020d000000000000",
    )
    includes = tuple(f"-isystem{folder}" for folder in include)
    libraries = (*(f"-L{folder}" for folder in library), "-ltorch_cpu", "-lc10")
    return Unit(name, (HEADERS / f"{name}.cpp").read_text(), (*flags, *includes), included(f"{name}.cpp"), libraries)
