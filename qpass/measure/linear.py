"""One linear layer with its weight streamed from memory: our kernels, and what torch has for the same layer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import qpass.ops  # noqa: F401  registers torch.ops.qpass
from qpass.kernels import load
from qpass.kernels.format import KernelFormat
from qpass.kernels.pack import pack
from qpass.measure.record import Record
from qpass.scheme import Scheme

COPIES_BYTES = 200 << 20
"""A candidate walks through this much of copies of its weight: more than most machines' last-level caches hold."""

PEERS = ("bf16", "bf16-onednn", "int8-onednn", "int4pack-g128", "int8pack")
"""``F.linear``; oneDNN's prepacked bf16, which Inductor's freezing uses; ``torch._int_mm``; ATen's weight-only kernels."""


@dataclass
class Candidate:
    """``call(x, i)`` runs with weight copy i; ``weight_bytes`` is what one call reads of it."""

    call: Callable[[Tensor, int], Tensor]
    copies: int
    weight_bytes: int

    def seconds(self, x: Tensor) -> float:
        """The mean over one pass through the copies, cut short after 60 of them or a tenth of a second."""
        start = now = time.perf_counter()
        done = 0
        while done < min(self.copies, 60) and now < start + 0.1:
            self.call(x, done)
            now, done = time.perf_counter(), done + 1
        return (now - start) / done


def format_of(scheme: Scheme) -> KernelFormat:
    """The kernel format that round-to-nearest weights of a scheme have: float16 scales where a group has its own."""
    weight = scheme.weight
    assert weight is not None
    scale_bytes = 4 if weight.group is None else 1 if weight.integer_scales else 2
    return KernelFormat(weight.bits, weight.group, scheme.activation, scale_bytes)


def candidate(name: str, n: int, k: int) -> Candidate:
    """A scheme's kernel or one of :data:`PEERS` for N outputs and K inputs, on random weights."""
    generator = torch.Generator().manual_seed(0)
    if name in PEERS:
        return _peer(name, n, k, generator)
    format = format_of(Scheme.parse(name))
    load.ensure(format)
    groups = format.groups(k)
    codes = torch.randint(0, 1 << format.bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, groups, generator=generator) / 1024 + 0.0009765625).half().float()
    if format.integer_scales:
        scales = torch.randint(1, 12, (n, groups), generator=generator) / 8192
    zeros = torch.full((n, groups), 1 << (format.bits - 1), dtype=torch.uint8)
    first = pack(codes, scales, zeros, format)
    copies = -(-COPIES_BYTES // first.numel())
    packed = [first, *(first.clone() for _ in range(copies - 1))]
    kernel, number = torch.ops.qpass.packed_linear.default, format.number
    more = {"x_scale": 1.0} if format.rule == "a8-static" else {}
    return Candidate(
        lambda x, i: kernel(x, packed[i], None, None, None, n, k, number, 0, False, **more), copies, first.numel()
    )


def _peer(name: str, n: int, k: int, generator: torch.Generator) -> Candidate:
    if name in ("bf16", "bf16-onednn"):
        size = 2 * n * k
        copies = -(-COPIES_BYTES // size)
        first = torch.randn(n, k, generator=generator).to(torch.bfloat16)
        dense = [first.clone() for _ in range(copies)]
        if name == "bf16":
            return Candidate(lambda x, i: torch.nn.functional.linear(x, dense[i]), copies, size)
        prepacked = [torch.ops.mkldnn._reorder_linear_weight(w, None) for w in dense]
        op = torch.ops.mkldnn._linear_pointwise
        return Candidate(lambda x, i: op(x, prepacked[i], None, "none", [], ""), copies, size)
    if name == "int8-onednn":
        copies = -(-COPIES_BYTES // (n * k))
        signed = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        weights = [signed.clone().t() for _ in range(copies)]
        return Candidate(lambda x, i: torch._int_mm(x.to(torch.int8), weights[i]), copies, n * k)
    if name == "int8pack":
        copies = -(-COPIES_BYTES // (n * k))
        signed = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        codes, scale = [signed.clone() for _ in range(copies)], torch.rand(n).to(torch.bfloat16)
        return Candidate(lambda x, i: torch.ops.aten._weight_int8pack_mm(x, codes[i], scale), copies, n * k)
    copies = -(-COPIES_BYTES // (n * k // 2))
    raw = torch.randint(0, 16, (n, k), dtype=torch.int32, generator=generator)
    first = torch.ops.aten._convert_weight_to_int4pack_for_cpu(raw, 1)
    nibbles = [first.clone() for _ in range(copies)]
    scales_and_zeros = [torch.rand(k // 128, n, 2).to(torch.bfloat16) for _ in range(copies)]
    int4 = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Candidate(lambda x, i: int4(x, nibbles[i], 128, scales_and_zeros[i]), copies, n * k // 2)


def interleaved(candidates: dict[str, Candidate], x: Tensor, rounds: int, budget_s: float = 2.0) -> dict[str, float]:
    """Median seconds a call, the candidates taking turns (A B A B); one that would take over ``budget_s`` gets one turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, each in candidates.items():
            if sum(times[name]) * min(each.copies, 60) < budget_s or not times[name]:
                times[name].append(each.seconds(x))
    return {name: statistics.median(values) for name, values in times.items()}


def newest(records: Iterable[Record]) -> list[Record]:
    """Of records of linear layers, the last of each machine, name, shape and M, and of each path where paths were timed."""
    found: dict[tuple, Record] = {}
    for record in records:
        s = record.settings
        if record.what in ("linear", "linear-path"):
            path = s.get("path") if record.what == "linear-path" else None
            found[record.what, record.machine.cpu, s["name"], s["n"], s["k"], s["m"], path] = record
    return list(found.values())
