"""Linear layers against the machine's limits: our kernels, ATen, oneDNN and Inductor over M, weights streamed from memory.

    python benchmarks/roofline.py [-o benchmarks/results/NAME.jsonl] [--picture docs/roofline.svg]
    python benchmarks/roofline.py --from benchmarks/results/NAME.jsonl --picture docs/roofline.svg

The candidates take turns (A B A B); the memory's read rate is measured between the turns, since it drifts on shared
machines. A candidate that is slow beyond reason at some M gets one turn there.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from qpass.kernels.load import retune, tuning_of
from qpass.kernels.plan import Path as Path_
from qpass.kernels.plan import paths
from qpass.kernels.rates import measure, measured_cpu
from qpass.kernels.search import ALWAYS
from qpass.measure.linear import COPIES_BYTES, PEERS, Candidate, candidate, format_of, newest
from qpass.measure.pictures import draw_roofline
from qpass.measure.record import Record, append, read
from qpass.measure.report_data import linear_shares
from qpass.scheme import Scheme

SHAPES = ((8960, 1536), (1536, 8960), (1536, 1536))  # N, K: up, down and output projections of a 1.5B model
TOKENS = (1, 2, 4, 5, 8, 16, 32, 64, 128, 512, 2048)
SCHEMES = ("w4a8-g128", "w4a8-g128-intscale", "w8a8-dynamic", "w4a16-g128", "w8a16", "w3a8-g64", "w2a8-g64")
INDUCTOR = "bf16-inductor"
DRAWN = ("w4a8-g128", "w8a8-dynamic", "w4a16-g128", "w8a16", "bf16-onednn", "int4pack-g128", "int8pack")
BEHIND = 8.0  # times the fastest: such a candidate is not repeated


class Layered(Candidate):
    """One call runs all copies."""

    def seconds(self, x: Tensor) -> float:
        start = time.perf_counter()
        self.call(x, 0)
        return (time.perf_counter() - start) / self.copies


def inductor(n: int, k: int) -> Candidate:
    """``F.linear`` over copies of a bf16 weight in one graph, with freezing and max-autotune; compiled for each M."""
    copies = -(-COPIES_BYTES // (2 * n * k))
    layers = torch.nn.ModuleList(torch.nn.Linear(k, n, bias=False).to(torch.bfloat16) for _ in range(copies)).eval()

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x) for layer in self.layers]

    compiled = torch.compile(Layers().eval(), dynamic=False, options={"freezing": True, "max_autotune": True})
    return Layered(lambda x, i: compiled(x)[0], copies, 2 * n * k)


def grid(names: tuple[str, ...], tokens: tuple[int, ...], rounds: int) -> list[Record]:
    cpu, records = measured_cpu(), []
    for n, k in SHAPES:
        cases = {name: inductor(n, k) if name == INDUCTOR else candidate(name, n, k) for name in names}
        for m in tokens:
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)
            times: dict[str, list[float]] = {name: [] for name in cases}
            reads = []
            for case in cases.values():
                case.call(x, 0)
            for turn in range(rounds if m < 512 else 3):
                reads.append(measure(cpu).read_bytes)
                best = min((min(t) for t in times.values() if t), default=0.0)
                for name, case in cases.items():
                    if turn == 0 or times[name][0] < BEHIND * best:
                        times[name].append(case.seconds(x))
            rates = asdict(measure(cpu)) | {"read_bytes": sorted(reads)[len(reads) // 2]}
            for name, seen in times.items():
                settings = {"name": name, "n": n, "k": k, "m": m, "weight_bytes": cases[name].weight_bytes}
                if name in SCHEMES:
                    format = format_of(Scheme.parse(name))
                    settings["path"] = tuning_of(format).path(format, cpu.tier, m)
                records.append(Record.of("linear", [1e3 * s for s in seen], "ms", settings | {"rates": rates}))
            print(
                f"{k} -> {n}, M = {m}: " + ", ".join(f"{name} {1e3 * min(t):.3f}" for name, t in times.items()),
                flush=True,
            )
    return records


def each_path(names: tuple[str, ...], tokens: tuple[int, ...]) -> list[Record]:
    """Our schemes on the first shape, every way of walking it: what the performance model has to choose among."""
    (n, k), cpu, records = SHAPES[0], measured_cpu(), []
    for name in names:
        case, format = candidate(name, n, k), format_of(Scheme.parse(name))
        before = tuning_of(format)
        for m in tokens:
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)
            times: dict[Path_, list[float]] = {path: [] for path in paths(format, cpu.tier, m)}
            reads = []
            for _ in range(5):
                reads.append(measure(cpu).read_bytes)
                for path, seen in times.items():
                    retune(format, ALWAYS[path])
                    seen.append(case.seconds(x))
            rates = asdict(measure(cpu)) | {"read_bytes": sorted(reads)[len(reads) // 2]}
            for path, seen in times.items():
                settings = {"name": name, "n": n, "k": k, "m": m, "path": path, "weight_bytes": case.weight_bytes}
                records.append(Record.of("linear-path", [1e3 * s for s in seen], "ms", settings | {"rates": rates}))
            print(
                f"{name}, M = {m}: " + ", ".join(f"{path} {1e3 * min(t):.3f}" for path, t in times.items()), flush=True
            )
        retune(format, before)
    return records


def draw(records: list[Record], path: Path) -> None:
    n, k = SHAPES[0]
    lines: dict[str, list[tuple[int, float, float]]] = {name: [] for name in DRAWN}
    for record in records:
        s = record.settings
        if (s["n"], s["k"]) == (n, k) and s["name"] in lines:
            lines[s["name"]].append((s["m"], *linear_shares(record)))
    cpu = records[0].machine.cpu
    title = f"One linear layer, {k} to {n}, weights from memory, {records[0].machine.cores} threads, {cpu} ({records[0].machine.tier})"
    draw_roofline({name: sorted(points) for name, points in lines.items() if points}, title, path, peers=DRAWN[4:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=[*SCHEMES, *PEERS, INDUCTOR])
    parser.add_argument("--m", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--paths", action="store_true", help="time each way of walking a call instead")
    parser.add_argument("--from", dest="source", type=Path, help="draw these results instead of measuring")
    parser.add_argument("-o", "--output", type=Path, help="append the records to this file")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 3 * len(args.m) + 1  # Inductor's candidate is compiled for each M and shape
    with torch.no_grad():
        if args.source:
            records = [record for record in newest(read(args.source)) if record.what == "linear"]
        elif args.paths:
            ours = tuple(name for name in args.names if name in SCHEMES)
            records = each_path(ours, tuple(m for m in args.m if m <= 512))
        else:
            records = grid(tuple(args.names), tuple(args.m), args.rounds)
    if args.output:
        append(args.output, records)
    if args.picture:
        draw(records, args.picture)


if __name__ == "__main__":
    main()
