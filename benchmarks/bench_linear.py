"""One linear layer, generated kernels against what ATen ships; weights streamed from memory.

    pytest benchmarks/bench_linear.py                  the grid as pytest-benchmark cases
    python benchmarks/bench_linear.py [--m 1 5 128]    a table: milliseconds, and the ratio to the ATen kernel beside it

Each candidate cycles through enough copies of its weight to leave the L3 cache far behind. The table interleaves the
candidates (A B A B ...) and gives medians, so that the ratios survive a machine whose speed drifts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import qpass.ops  # noqa: F401
from qpass.cpu import detect
from qpass.kernels import load
from qpass.kernels.format import KernelFormat
from qpass.kernels.pack import pack
from qpass.kernels.plan import SERVED
from qpass.measure.bandwidth import measure_bandwidth_gbps

SHAPES = ((8960, 1536), (1536, 8960))  # N, K: up and down of a 1.5B model
TOKENS = (1, 2, 4, 5, 8, 16, 32, 128, 512)
COPIES_BYTES = 200 << 20

FORMATS = {
    "w4a16-g128": KernelFormat(4, 128, "a16", 2),
    "w4a8-g128": KernelFormat(4, 128, "a8-token-group", 2),
    "w4a16-g32": KernelFormat(4, 32, "a16", 2),
    "w4a8-g32": KernelFormat(4, 32, "a8-token-group", 2),
    "w3a16-g64": KernelFormat(3, 64, "a16", 2),
    "w3a8-g64": KernelFormat(3, 64, "a8-token-group", 2),
    "w2a16-g32": KernelFormat(2, 32, "a16", 2),
    "w2a8-g64": KernelFormat(2, 64, "a8-token-group", 2),
    "w8a16": KernelFormat(8, None, "a16", 4),
    "w8a8": KernelFormat(8, None, "a8-token", 4),
}
ATEN = ("int4pack-g128", "int8pack", "bf16")
READ = "read"  # torch's sum over as many bytes as an int4 weight has: what the memory gives at that moment


@dataclass
class Candidate:
    """``call(x, i)`` runs with weight copy i; ``bytes`` is what one call reads of it."""

    call: Callable[[Tensor, int], Tensor]
    copies: int
    bytes: int


def candidate(name: str, n: int, k: int) -> Candidate:
    generator = torch.Generator().manual_seed(0)
    if name == "bf16":
        size = n * k * 2
        copies = -(-COPIES_BYTES // size)
        dense = [torch.randn(n, k, generator=generator).to(torch.bfloat16) for _ in range(copies)]
        return Candidate(lambda x, i: torch.nn.functional.linear(x, dense[i]), copies, size)
    if name == READ:
        copies = -(-COPIES_BYTES // (n * k // 2))
        words = [torch.ones(n * k // 16, dtype=torch.int64) for _ in range(copies)]
        return Candidate(lambda x, i: words[i].sum(), copies, n * k // 2)
    if name == "int8pack":
        copies = -(-COPIES_BYTES // (n * k))
        codes = [torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator) for _ in range(copies)]
        scale = torch.rand(n).to(torch.bfloat16)
        return Candidate(lambda x, i: torch.ops.aten._weight_int8pack_mm(x, codes[i], scale), copies, n * k)
    if name == "int4pack-g128":
        copies = -(-COPIES_BYTES // (n * k // 2))
        raw = torch.randint(0, 16, (n, k), dtype=torch.int32, generator=generator)
        first = torch.ops.aten._convert_weight_to_int4pack_for_cpu(raw, 1)
        packs = [first.clone() for _ in range(copies)]
        sz = [torch.rand(k // 128, n, 2).to(torch.bfloat16) for _ in range(copies)]
        op = torch.ops.aten._weight_int4pack_mm_for_cpu
        return Candidate(lambda x, i: op(x, packs[i], 128, sz[i]), copies, n * k // 2)
    format = FORMATS[name]
    load.ensure(format)
    groups = format.groups(k)
    codes = torch.randint(0, 1 << format.bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand(n, groups, generator=generator).half().float() / 1024 + 0.0009765625
    zeros = torch.full((n, groups), 1 << (format.bits - 1), dtype=torch.uint8)
    one = pack(codes, scales.half().float(), zeros, format)
    copies = -(-COPIES_BYTES // one.numel())
    weights = [one, *(pack(codes, scales.half().float(), zeros, format) for _ in range(copies - 1))]
    kernel, number = torch.ops.qpass.packed_linear.default, format.number
    return Candidate(lambda x, i: kernel(x, weights[i], None, None, None, n, k, number, 0, False), copies, one.numel())


def seconds(candidate: Candidate, x: Tensor) -> float:
    """Mean over one pass through all copies."""
    start = time.perf_counter()
    for i in range(candidate.copies):
        candidate.call(x, i)
    return (time.perf_counter() - start) / candidate.copies


@pytest.mark.skipif(detect().tier not in SERVED, reason="the generated kernels need AVX-512 VNNI")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[1]}to{s[0]}")
@pytest.mark.parametrize("name", [*FORMATS, *ATEN])
def test_linear(benchmark, name: str, shape: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    n, k = shape
    case = candidate(name, n, k)
    for m in TOKENS:
        x = torch.randn(m, k).to(torch.bfloat16)
        benchmark.extra_info[f"ms at M={m}"] = statistics.median(seconds(case, x) for _ in range(3)) * 1e3
    x = torch.randn(1, k).to(torch.bfloat16)
    benchmark.pedantic(seconds, args=(case, x), rounds=5, warmup_rounds=1)
    benchmark.extra_info["bytes"] = case.bytes


def table(
    tokens: tuple[int, ...], names: tuple[str, ...], rounds: int, shapes: tuple[tuple[int, int], ...] = SHAPES
) -> None:
    cpu = detect()
    bandwidth = measure_bandwidth_gbps()
    print(f"{cpu.name}, tier {cpu.tier}, {torch.get_num_threads()} threads, read bandwidth {bandwidth:.1f} GB/s")
    baseline = {"w2": "int4pack-g128", "w3": "int4pack-g128", "w4": "int4pack-g128", "w8": "int8pack"}
    for n, k in shapes:
        cases = {name: candidate(name, n, k) for name in names}
        for m in tokens:
            x = torch.randn(m, k).to(torch.bfloat16)
            times: dict[str, list[float]] = {name: [] for name in names}
            slow = {name for name in ATEN if m >= 32 and name != "bf16"}
            for _ in range(rounds):
                for name, case in cases.items():
                    if name not in slow or len(times[name]) < 2:
                        times[name].append(seconds(case, x))
            medians = {name: statistics.median(values) for name, values in times.items()}
            bandwidth = cases[READ].bytes / medians[READ] / 1e9 if READ in medians else bandwidth
            print(f"\n{k} -> {n}, M = {m}")
            for name, median in medians.items():
                rate, work = cases[name].bytes / median / 1e9, 2 * m * n * k / median / 1e12
                line = (
                    f"  {name:14} {median * 1e3:8.3f} ms  {rate:6.1f} GB/s ({rate / bandwidth:4.0%})  {work:6.3f} TOPS"
                )
                for other in (baseline.get(name[:2], ""), "bf16"):
                    if other in medians and name not in ATEN:
                        line += f"   {median / medians[other]:5.2f} x {other}"
                print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--m", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--names", nargs="+", default=[*FORMATS, *ATEN, READ])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", type=int, choices=(0, 1), help="only the first or the second shape")
    args = parser.parse_args()
    table(tuple(args.m), tuple(args.names), args.rounds, SHAPES if args.shape is None else (SHAPES[args.shape],))


if __name__ == "__main__":
    with torch.no_grad():
        main()
