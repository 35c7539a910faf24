"""Plan: how a kernel walks a shape, and the time that takes: a performance model of registers, caches, instructions and memory.

Pure: no torch, no clock. After QIGen's idea (arXiv 2307.03738): a model chooses the blocking, a generator emits the kernel.
What the machine reaches at most comes in as ``Cpu.rates``; every constant of the model has a name and a source here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from qpass.cpu import TIERS, Cpu, Rates, Tier
from qpass.kernels.format import BLOCK, KernelFormat

Path = Literal["linear", "stream", "panel", "tiles"]
"""linear: weights in the order they lie in, few accumulators. stream: vectors abreast, codes unpacked in registers, again
for each tile of rows from the cache. panel: unpacked once into the L2 cache. tiles: a panel, fed to AMX."""

SERVED: tuple[Tier, ...] = TIERS[1:]

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
"""By number, as ``QpassActivation`` in ``cpp/abi.h`` and ``qpass.ops.epilogue`` have them."""

LANES = 16
TOGETHER = 256  # rows that AMX takes through a segment before it is unpacked again (cpp/gemm_amx.h)
SHARING = 4  # blocks of outputs that share activations from beyond the L2 cache (cpp/kernel.h)
SEGMENT = {"a16": 128, "a8": 256}  # inputs between stores of the accumulators without groups (cpp/layout.h)

SPAN = {"a16": 1024, "a8": 2048}  # the same where several tiles walk a span of K each (cpp/segment.h)

UNPACK_OPS = {
    # vector instructions that make one operand of codes, counted in cpp/isa_*.h; loads apart
    (8, "a8"): 0.0,  # a row is an operand
    (4, "a8"): 1.5,  # and; shift, and
    (3, "a8"): 2.75,  # select of two planes, shift, and
    (2, "a8"): 1.75,  # shift, and
    (8, "a16"): 12.0,  # lookups in pairs of registers, on one port, and blends: for two operands of a row, with VBMI
    (4, "a16"): 1.75,  # shift and lookup
    (3, "a16"): 2.5,  # select, shift, lookup
    (2, "a16"): 1.75,
}
STEP_OPS = 2.5  # integer scales: multiply, subtract; and what a chunk's line becomes, for 16 operands
LOAD_OPS = 0.5  # a load of 64 bytes beside arithmetic: two a cycle on every core since Haswell
STORE_OPS = 2.0  # a store of 64 bytes: one a cycle
PREPARE_OPS = {"a16": 12.0, "a8": 14.0}  # 16 inputs: widen, (largest, scale, round, narrow), sum, store
EPILOGUE_OPS = 6.0  # 16 outputs: load, bias, round, store
DOT_LATENCY = {"a16": 6.0, "a8": 4.0}  # cycles, Zen 4 and Sapphire Rapids (uops.info: vdpbf16ps, vpdpbusd)


def a16_by_int8(format: KernelFormat, cpu: Cpu, tier: Tier) -> bool:
    """Whether 16-bit activations are multiplied as int8 terms (``cpp/prologue.h``): where int8 products cost less than bf16's.

    With VNNI alone bf16 is fp32 arithmetic, half as many products an instruction and conversions beside it; and Intel's
    vdpbf16ps runs every other cycle (Sapphire and Emerald Rapids, 2026-11: 80e9 products a second where vpdpbusd makes 700e9).
    AMD's runs twice a cycle (Zen 4). AMX has tiles for both, and two terms are as many products as bf16; codes become
    int8 in half of the time or none, but sums are scaled twice as often, which groups of less than 128 don't bear.
    """
    if format.rule != "a16" or tier == "amx":
        return format.rule == "a16" and not _tiles_only(format)
    slow = "avx512_bf16" not in cpu.isa or cpu.vendor == "GenuineIntel"
    return tier == "avx_vnni" or (tier == "avx512_vnni" and slow)


@dataclass(frozen=True)
class Core:
    """What counting instructions doesn't tell; fitted to measurements by ``benchmarks/fit_plan.py``."""

    fold_ops: float  # a finished group into 16 totals: zero, convert, scale, add, load, store
    held_fold_ops: float  # the same where the totals wait in registers
    dot_efficiency: float  # of the peak inside a tile: its loop, and the loads that begin it
    linear_read: float  # of the read bandwidth: the hardware prefetcher follows one stream best
    stream_read: float  # four streams a block
    l3_read: float  # times the memory's rate
    call_seconds: float  # the op's call and the waking of the other threads
    overlap: float  # exponent of the norm that joins memory and arithmetic: at 1 they wait for each other
    tile_efficiency: float = 0.5  # of the peak of AMX products, with the loads of their operands
    tile_fold_ops: float = 6.0  # as fold_ops, between products
    tile_unpack: float = 1.0  # times the instructions that unpack, between products


ZEN4 = Core(12.0, 7.0, 0.79, 0.82, 0.72, 5.0, 9e-6, 6.0)
XEON_AMX = Core(
    0.38, 12.7, 0.68, 0.84, 0.90, 3.0, 1.8e-5, 1.08, tile_efficiency=0.42, tile_fold_ops=9.4, tile_unpack=0.72
)


def core_of(tier: Tier) -> Core:
    """Those of the two machines that were measured: all that have AMX are Intel's of one kind."""
    return XEON_AMX if tier == "amx" else ZEN4


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
    prefetch_pages: int  # that are asked for in turns, a line of each; 0: one line after the other


@dataclass(frozen=True)
class Plan:
    """How one call runs, and what that should take."""

    tier: Tier
    path: Path
    tile_rows: int
    blocking: Blocking
    weight_bytes: int
    multiplies: int
    memory_seconds: float
    compute_seconds: float
    limit_seconds: float  # the memory at its full rate or the dot products at theirs, whichever takes longer
    seconds: float

    @property
    def bound(self) -> str:
        return "memory" if self.memory_seconds > self.compute_seconds else "arithmetic"


@dataclass(frozen=True)
class Tuning:
    """From how many rows on a call is walked how (``QpassTuning`` in ``cpp/abi.h``); never seen in the result's bits."""

    linear_rows: int
    panel_rows: int
    tile_rows: int

    def __iter__(self) -> Iterator[int]:
        return iter((self.linear_rows, self.panel_rows, self.tile_rows))

    def path(self, format: KernelFormat, tier: Tier, m: int) -> Path:
        if tier == "amx" and (_tiles_only(format) or m >= self.tile_rows):
            return "tiles"
        if m <= min(self.linear_rows, linear_limit(format, tier)):
            return "linear"
        return "panel" if format.unpacks and m >= self.panel_rows else "stream"


def _tiles_only(format: KernelFormat) -> bool:
    """Whether all calls take AMX's tiles, where there are some: those whose products are bf16."""
    return format.rule == "a16" and format.group is not None and format.group < 128


NEVER = 1 << 30

TYPICAL_RATES = Rates(read_bytes=30e9, int8_macs=460e9, bf16_macs=230e9, vector_ops=14.5e9)
"""Two cores of Zen 4 (2026-11): where nobody measured."""

AMX_RATES = Rates(30e9, 800e9, 105e9, 13e9, 6.8e12, 3.4e12)
"""Two cores of a Xeon with AMX (2026-11)."""


def typical_rates(tier: Tier) -> Rates:
    """Where nobody measured."""
    return AMX_RATES if tier == "amx" else TYPICAL_RATES


def linear_limit(format: KernelFormat, tier: Tier) -> int:
    """The most rows that a unit can walk in stored order (``Tuning::linear_rows`` in ``cpp/isa_*.h``)."""
    if tier in ("avx2", "avx_vnni"):
        return 1
    return 0 if format.rule == "a16" else 6 if format.bits == 8 else 2


def tile_rows(format: KernelFormat, tier: Tier, path: Path) -> int:
    """The most rows of a register tile (``Tuning`` in ``cpp/isa_*.h``): AVX-512 has 24 accumulators, or 12 and their
    totals, AVX2 8; or an AMX tile. Making bytes of 3 bits takes registers."""
    if path == "tiles":
        return 16
    crowded = format.bits == 3 and format.rule != "a16" and path != "panel"
    return 4 if crowded or tier in ("avx2", "avx_vnni") else 6


def blocking(cpu: Cpu) -> Blocking:
    """A quarter of the L2 cache for the totals, next to a panel, the activations of a segment and the weights to come."""
    rows = cpu.l2_bytes // 4 // (BLOCK * 4)
    pages = (
        8 if cpu.vendor == "GenuineIntel" else 0
    )  # 5 to 10% at up to six rows on Emerald Rapids; not measured on AMD's
    return Blocking(task_rows=max(192, min(2048, rows // 96 * 96)), prefetch_bytes=8192, prefetch_pages=pages)


def predict(shape: Shape, format: KernelFormat, cpu: Cpu, path: Path, tier: Tier | None = None) -> Plan:
    """What one call takes on ``path``. Raises ValueError where the machine has no tier that these kernels serve."""
    tier = tier or cpu.tier
    rates = cpu.rates or typical_rates(tier)
    if tier not in SERVED:
        raise ValueError(f"{cpu.name} has tier {tier}; the kernels need one of {', '.join(SERVED)}")
    wide = a16_by_int8(format, cpu, tier)
    core, kind = core_of(tier), "a16" if format.rule == "a16" and not wide else "a8"
    tokens, terms = shape.m, 2 if wide else 1  # of bf16 activations
    macs_of_dot = 32 if kind == "a16" else 64
    n, k = format.blocks(shape.n, shape.glu) * BLOCK, format.padded_k(shape.k)
    rows = tile_rows(format, tier, path)
    passes = -(-tokens * terms // rows)  # of a tile over the weights
    operands = n * k / macs_of_dot  # of 64 bytes
    dots = operands * tokens * terms
    spans = tier not in ("avx2", "avx_vnni") and (path == "panel" or (path == "stream" and passes > 1))
    accumulates = path == "tiles" and format.folds_once and kind == "a8"  # cpp/accumulate_amx.h
    whole = (SPAN if spans else SEGMENT)[kind]  # inputs between stores where no group ends
    segment = k if accumulates else whole if format.folds_once else format.group or whole
    folds = tokens * terms * n / LANES * -(-k // segment) / rates.vector_ops
    unpack_ops = UNPACK_OPS[format.bits, kind] + (STEP_OPS if format.integer_scales else 0.0)
    unpacking = operands * unpack_ops
    if path == "tiles":
        rate = (rates.int8_tile_macs if kind == "a8" else rates.bf16_tile_macs) * core.tile_efficiency
        padded = (
            passes * rows / (shape.m * terms) if shape.m * terms >= rows else 1.0
        )  # the last tile's empty rows are multiplied too
        turns = -(-shape.m // TOGETHER) if format.unpacks else 0
        unpacked = (unpacking + operands * STORE_OPS) * core.tile_unpack * turns / rates.vector_ops
        compute = dots * macs_of_dot * padded / max(rate, 1.0) + unpacked + folds * core.tile_fold_ops
    else:
        rate = (rates.int8_macs if kind == "a8" else rates.bf16_macs) / macs_of_dot * core.dot_efficiency
        height = min(tokens * terms, rows)
        multiplying = dots / rate * max(1.0, DOT_LATENCY[kind] / (height * 4))  # at least: too few sums in flight
        if path == "panel":
            beforehand = operands * (unpack_ops + LOAD_OPS + STORE_OPS) / rates.vector_ops
            compute = beforehand + max(multiplying, (dots + operands * LOAD_OPS * passes) / rates.vector_ops)
        else:
            times = 1 if path == "linear" else passes
            compute = max(multiplying, (dots + (unpacking + operands * LOAD_OPS) * times) / rates.vector_ops)
        # behind the tile that it closes: nothing to overlap with
        compute += folds * (core.held_fold_ops if spans else core.fold_ops)
    moved = format.packed_bytes(shape.n, shape.k, shape.glu)
    memory = moved / (rates.read_bytes * (core.linear_read if path == "linear" else core.stream_read))
    tasks = format.blocks(shape.n, shape.glu) // (2 if shape.glu else 1) * -(-shape.m // blocking(cpu).task_rows)
    idle = -(-tasks // cpu.cores) * cpu.cores / tasks  # the last tasks leave threads without work
    prepared = tokens * k * (2 if format.rule == "a16" else 1)
    if prepared > cpu.l2_bytes // 2:  # activations come from the next cache again, for every block of outputs
        sharing = SHARING if path == "tiles" else 1
        compute += n / BLOCK / sharing * prepared / (rates.read_bytes * core.l3_read)
    prepare = shape.m * k / LANES * PREPARE_OPS[kind] * terms / rates.vector_ops * (cpu.cores if shape.m == 1 else 1)
    finish = shape.m * n / LANES * EPILOGUE_OPS / rates.vector_ops
    busy = (memory**core.overlap + (compute * idle) ** core.overlap) ** (1 / core.overlap)
    peak = max(rates.int8_macs, rates.int8_tile_macs) if kind == "a8" else max(rates.bf16_macs, rates.bf16_tile_macs)
    peak /= terms
    multiplies = shape.m * shape.n * shape.k
    return Plan(
        tier=tier,
        path=path,
        tile_rows=rows,
        blocking=blocking(cpu),
        weight_bytes=moved,
        multiplies=multiplies,
        memory_seconds=memory,
        compute_seconds=compute,
        limit_seconds=max(moved / rates.read_bytes, multiplies / peak),
        seconds=core.call_seconds + prepare + busy + finish,
    )


def paths(format: KernelFormat, tier: Tier, m: int) -> tuple[Path, ...]:
    """The ways in which a tier's unit can walk M rows. Tiles round bf16 products in their own way, so with AMX all calls of
    bf16 take them, and a row has the same bits whatever is computed with it."""
    if tier == "amx" and _tiles_only(format):
        return ("tiles",)
    found: list[Path] = ["stream"]
    if m <= linear_limit(format, tier):
        found.append("linear")
    if format.unpacks:
        found.append("panel")
    if tier == "amx":
        found.append("tiles")
    return tuple(found)


def plan(shape: Shape, format: KernelFormat, cpu: Cpu) -> Plan:
    """The fastest path as the model sees it. Raises ValueError where the machine has no tier that these kernels serve."""
    return min(
        (predict(shape, format, cpu, path) for path in paths(format, cpu.tier, shape.m)), key=lambda p: p.seconds
    )


REFERENCE = (8960, 1536)
"""N and K of the shape on which thresholds are chosen: an up projection of a 1.5B model."""


def tuning(format: KernelFormat, cpu: Cpu, tier: Tier | None = None) -> Tuning:
    """The thresholds in M that follow from the model."""
    (n, k), tier = REFERENCE, tier or cpu.tier
    if tier == "amx" and not (cpu.rates and cpu.rates.int8_tile_macs):
        cpu = replace(cpu, rates=AMX_RATES)

    def faster(a: Path, b: Path, m: int) -> bool:
        shape = Shape(m, n, k)
        return predict(shape, format, cpu, a, tier).seconds < predict(shape, format, cpu, b, tier).seconds

    linear = 0
    while linear < linear_limit(format, tier) and faster("linear", "stream", linear + 1):
        linear += 1
    panel = next((m for m in range(2, 257) if faster("panel", "stream", m)), NEVER) if format.unpacks else NEVER
    vector = Tuning(linear, panel, NEVER)
    if tier != "amx":
        return vector
    tiles = next((m for m in range(1, 257) if faster("tiles", vector.path(format, tier, m), m)), NEVER)
    return replace(vector, tile_rows=tiles)


def refuse(format: KernelFormat, k: int) -> str | None:
    """Why no kernel of this format can take K inputs; None if one can."""
    if format.folds_once and format.rule != "a16" and 255 * 127 * format.padded_k(k) >= 1 << 31:
        return f"K = {k} inputs of one channel can overflow the 32-bit sums of int8 products"
    return None
