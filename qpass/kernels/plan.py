"""Plan: which kernel serves a format, how it walks a shape, and what it reads. Pure: no torch, no clock."""

from __future__ import annotations

from dataclasses import dataclass

from qpass.cpu import Cpu, Tier

BLOCK = 64
"""Outputs of a block of the packed weight (``cpp/layout.h``)."""

PANEL_ROWS = {4: 61, 8: 13}
"""By bits: rows from which codes are unpacked once for all of them (``cpp/layout.h``)."""

SERVED: tuple[Tier, ...] = ("avx512_vnni", "amx")

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
"""By number, as ``QpassActivation`` in ``cpp/abi.h`` and ``qpass.ops.epilogue`` have them."""

_GROUPS = (None, 32, 64, 128)
_RULES = ("a16", "a8-token", "a8-token-group")


@dataclass(frozen=True)
class KernelFormat:
    """What one kernel unit is compiled for; ``group`` None is per channel. Its ``number`` means the same in every process."""

    bits: int
    group: int | None
    rule: str
    scale_bytes: int = 4

    def __post_init__(self) -> None:
        known = self.group in _GROUPS and self.rule in _RULES
        if self.bits not in (4, 8) or self.scale_bytes not in (2, 4) or not known:
            raise ValueError(f"no kernel has {self}")
        if self.group is None and self.rule == "a8-token-group":
            raise ValueError("without weight groups, activations have one scale a token: a8-token")

    @property
    def number(self) -> int:
        group, rule = _GROUPS.index(self.group), _RULES.index(self.rule)
        return (self.bits == 8) | group << 1 | rule << 3 | (self.scale_bytes == 4) << 5

    @classmethod
    def of(cls, number: int) -> KernelFormat:
        """The format behind a number. Raises ValueError for one that means nothing."""
        if not 0 <= number < 64 or (number >> 3) & 3 == 3:
            raise ValueError(f"{number} is no format")
        bits, scale_bytes = (8 if number & 1 else 4), (4 if number >> 5 else 2)
        return cls(bits, _GROUPS[(number >> 1) & 3], _RULES[(number >> 3) & 3], scale_bytes)

    @property
    def unpacks(self) -> bool:
        """Whether codes are not yet what the dot products take; 8-bit ones times int8 activations are."""
        return self.bits == 4 or self.rule == "a16"

    def padded_k(self, k: int) -> int:
        length = self.group or BLOCK
        return -(-k // length) * length

    def groups(self, k: int) -> int:
        return 1 if self.group is None else -(-k // self.group)

    def blocks(self, n: int, glu: bool) -> int:
        return 2 * -(-(n // 2) // BLOCK) if glu else -(-n // BLOCK)

    def packed_bytes(self, n: int, k: int, glu: bool = False) -> int:
        """Length of the packed weight: per block and group the codes, 64 scales and 64 zeros."""
        codes = BLOCK * self.padded_k(k) * self.bits // 8
        return self.blocks(n, glu) * (codes + self.groups(k) * BLOCK * (self.scale_bytes + 1))


@dataclass(frozen=True)
class Shape:
    """M tokens, N outputs (gate and up together when ``glu``), K inputs."""

    m: int
    n: int
    k: int
    glu: bool = False


@dataclass(frozen=True)
class Blocking:
    """The compile-time choices of a unit."""

    task_rows: int  # rows whose fp32 totals (64 outputs each) stay in the L2 cache
    prefetch_bytes: int  # how far ahead of its use a weight is asked for


@dataclass(frozen=True)
class Plan:
    """How one call runs. ``path``: 'stream' unpacks codes in registers, 'panel' once into the L1 cache, 'tiles' feeds AMX."""

    tier: Tier
    path: str
    blocking: Blocking
    weight_bytes: int
    multiplies: int


def blocking(cpu: Cpu) -> Blocking:
    """A quarter of the L2 cache for the totals, next to a panel, the activations of a segment and the weights to come."""
    rows = cpu.l2_bytes // 4 // (BLOCK * 4)
    return Blocking(task_rows=max(192, min(2048, rows // 96 * 96)), prefetch_bytes=8192)


def plan(shape: Shape, format: KernelFormat, cpu: Cpu) -> Plan:
    """Raises ValueError where the machine has no tier that these kernels serve."""
    tier = cpu.tier
    if tier not in SERVED:
        raise ValueError(f"{cpu.name} has tier {tier}; the kernels need one of {', '.join(SERVED)}")
    if tier == "amx" and shape.m > (64 if format.rule == "a16" else 4):
        path = "tiles"
    else:
        path = "panel" if format.unpacks and shape.m >= PANEL_ROWS[format.bits] else "stream"
    weight_bytes = format.packed_bytes(shape.n, shape.k, shape.glu)
    return Plan(tier, path, blocking(cpu), weight_bytes, shape.m * shape.n * shape.k)


def refuse(format: KernelFormat, k: int) -> str | None:
    """Why no kernel of this format can take K inputs; None if one can."""
    if format.group is None and format.rule != "a16" and 255 * 127 * format.padded_k(k) >= 1 << 31:
        return f"K = {k} inputs of one channel can overflow the 32-bit sums of int8 products"
    return None
