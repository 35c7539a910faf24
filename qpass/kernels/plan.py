"""Plan: which kernel serves a format, how it walks a shape, and what it reads. Pure: no torch, no clock."""

from __future__ import annotations

from dataclasses import dataclass

from qpass.cpu import TIERS, Cpu, Tier
from qpass.kernels.format import BLOCK, KernelFormat

PANEL_ROWS = {2: 61, 3: 61, 4: 61, 8: 13}
"""By bits: rows from which codes are unpacked once for all of them (``cpp/layout.h``)."""

SERVED: tuple[Tier, ...] = TIERS[1:]

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
"""By number, as ``QpassActivation`` in ``cpp/abi.h`` and ``qpass.ops.epilogue`` have them."""


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
