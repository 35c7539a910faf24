"""The instruction sets that attention's unit, which rotates too, is tested on."""

from __future__ import annotations

from qpass.cpu import TIERS, Tier, detect

CPU = detect()
# Every tier that this machine runs, each with all that the CPU has beyond it; avx_vnni adds no instruction that
# attention uses, so its unit runs wherever that of avx2 does; amx is emulated where it is missing. "False": bf16 without
# vdpbf16ps.
RUNS_ON: dict[Tier, Tier] = {"avx_vnni": "avx2", "amx": "avx512_vnni"}
UNITS = [(tier, True) for tier in TIERS[1:] if CPU.runs(RUNS_ON.get(tier, tier))]
UNITS = [unit for unit in UNITS if unit[0] != "amx" or "avx512_bf16" in CPU.isa]
UNITS += [("avx512_vnni", False)] if "avx512_bf16" in CPU.isa and CPU.runs("avx512_vnni") else []
