"""Source: the translation unit of one kernel. It holds only what depends on the format; the rest is in ``cpp/``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qpass.cpu import Cpu, Tier
from qpass.kernels.plan import Blocking, KernelFormat, blocking

HEADERS = Path(__file__).parent / "cpp"

_RULES = {"a16": "QPASS_A16", "a8-token": "QPASS_A8_TOKEN", "a8-token-group": "QPASS_A8_TOKEN_GROUP"}

_TIER_FLAGS: dict[Tier, tuple[str, ...]] = {
    "avx512_vnni": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c", "-mbmi2"),
}
_TIER_FLAGS["amx"] = (*_TIER_FLAGS["avx512_vnni"], "-mavx512bf16", "-DQPASS_AMX")

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


def kernel_unit(format: KernelFormat, cpu: Cpu, tier: Tier | None = None, *, emulate_amx: bool = False) -> Unit:
    """The unit of one format for one tier (the machine's own by default). Pure.

    ``emulate_amx`` replaces the tile instructions by plain C++: for tests on a machine without them.
    """
    tier = tier or cpu.tier
    if tier not in _TIER_FLAGS:
        raise ValueError(f"there are no kernels for tier {tier}")
    flags = list(_TIER_FLAGS[tier])
    if tier != "amx" and "avx512_bf16" in cpu.isa:
        flags.append("-mavx512bf16")
    flags += [flag for name, flag in (("avx512vbmi", "-mavx512vbmi"), ("gfni", "-mgfni")) if name in cpu.isa]
    if emulate_amx:
        flags.append("-DQPASS_AMX_EMULATED")
        if "avx512_bf16" not in cpu.isa and "-mavx512bf16" in flags:
            flags.remove("-mavx512bf16")
    group = f"g{format.group}" if format.group else "channel"
    name = f"w{format.bits}-{group}-{format.rule}-f{8 * format.scale_bytes}-{tier}"
    return Unit(name, _text(format, blocking(cpu)), (*COMMON_FLAGS, *flags), tuple(sorted(HEADERS.glob("*.h"))))


def _text(format: KernelFormat, blocking: Blocking) -> str:
    arguments = f"{format.bits}, {format.group or 0}, {_RULES[format.rule]}, {format.scale_bytes}"
    return (
        f"#define QPASS_TASK_ROWS {blocking.task_rows}\n"
        f"#define QPASS_PREFETCH_BYTES {blocking.prefetch_bytes}\n"
        f'#include "kernel.h"\n'
        f"QPASS_DEFINE_KERNEL({format.number}, {arguments})\n"
    )


def binding_unit(include: tuple[str, ...], library: tuple[str, ...]) -> Unit:
    """The unit that registers ``qpass::packed_linear`` with torch, whose folders the caller knows."""
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
    headers = (HEADERS / "abi.h", HEADERS / "binding.h")
    return Unit("binding", (HEADERS / "binding.cpp").read_text(), (*flags, *includes), headers, libraries)
