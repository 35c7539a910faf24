"""Cpu: what the machine can do. The only file that asks what machine this is; it imports no torch."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from qpass.errors import OptionError

Tier = Literal["none", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx"]

TIERS: tuple[Tier, ...] = ("none", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx")
"""From the poorest to the richest. Not every machine of a tier has those below it: Zen 4 has AVX-512 VNNI and no
AVX-VNNI, Alder Lake the reverse."""

_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

_NEEDS: dict[Tier, frozenset[str]] = {
    "none": frozenset(),
    "avx2": _AVX2,
    "avx_vnni": _AVX2 | {"avx_vnni"},
    "avx512": _AVX512,
    "avx512_vnni": _AVX512 | {"avx512_vnni"},
    "amx": _AVX512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
}

_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18
_SYS_ARCH_PRCTL = 158


@dataclass(frozen=True)
class Rates:
    """What all cores together reach at most, a second: bytes from memory, multiply-accumulates, 64-byte vector instructions."""

    read_bytes: float
    int8_macs: float
    bf16_macs: float
    vector_ops: float
    int8_tile_macs: float = 0.0  # AMX; 0 without it
    bf16_tile_macs: float = 0.0


@dataclass(frozen=True)
class Cpu:
    """One machine. ``isa`` holds the flags as Linux spells them; cache sizes are bytes of one instance."""

    name: str
    vendor: str
    isa: frozenset[str]
    cores: int
    l1d_bytes: int = 32 << 10
    l2_bytes: int = 1 << 20
    l3_bytes: int = 16 << 20
    amx_permitted: bool = False
    cap: Tier | None = None  # QPASS_ISA
    rates: Rates | None = None  # where somebody measured them (kernels/rates.py)

    @property
    def tier(self) -> Tier:
        """The richest tier that the machine, the kernel's permission and the cap allow."""
        allowed = TIERS if self.cap is None else TIERS[: TIERS.index(self.cap) + 1]
        return next(tier for tier in reversed(allowed) if self.runs(tier))

    def runs(self, tier: Tier) -> bool:
        """Whether code of this tier can run here; a cap doesn't matter."""
        return _NEEDS[tier] <= self.isa and (tier != "amx" or self.amx_permitted)


def detect() -> Cpu:
    """This machine; ``QPASS_ISA`` caps its tier. Raises OptionError for an unknown cap."""
    return _detect(os.environ.get("QPASS_ISA") or None)


@cache
def _detect(cap: str | None) -> Cpu:
    accepted = TIERS[1:]
    if cap is not None and cap not in accepted:
        raise OptionError(f"QPASS_ISA={cap}: accepted are {', '.join(accepted)}")
    fields = _cpuinfo()
    isa = frozenset(fields.get("flags", "").split())
    caches = {level: _cache_bytes(level) for level in (1, 2, 3)}
    return Cpu(
        name=fields.get("model name", platform.processor() or platform.machine()),
        vendor=fields.get("vendor_id", "unknown"),
        isa=isa,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        l1d_bytes=caches[1] or 32 << 10,
        l2_bytes=caches[2] or 1 << 20,
        l3_bytes=caches[3] or 16 << 20,
        amx_permitted="amx_tile" in isa and _request_amx(),
        cap=cap,  # type: ignore[arg-type]
    )


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cache_bytes(level: int) -> int | None:
    """The size of processor 0's data or unified cache at ``level``; None where the kernel doesn't say."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            found, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        match = re.fullmatch(r"(\d+)([KM]?)", size)
        if found == str(level) and kind != "Instruction" and match:
            return int(match[1]) << {"": 0, "K": 10, "M": 20}[match[2]]
    return None


def _request_amx() -> bool:
    """Ask Linux for the tile registers: AMX is off in a process until it does. Holds for all its later threads."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return False
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_long)
    syscall.restype = ctypes.c_long
    return bool(syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)
