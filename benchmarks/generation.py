"""TTFT, TPOT, memory and compile time of a model under several schemes, as Records.

    python benchmarks/generation.py MODEL [--schemes inductor,w8a16,w4a16-g128,w4a8-g128] [-o benchmarks/results/NAME.jsonl]

"inductor" is stock torch.compile on the unquantized model, in the same static-cache loop. Speed is measured in one
process, in turns (A B A B), so that a drift of the machine hits all alike; compile time and memory in a process of
their own a variant, cold (empty caches) and warm (the second process). Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import argparse as prompt_source  # its own text is the prompt: always there, and no model was calibrated on it
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import qpass
from qpass.frontends.hf import Loaded, load
from qpass.measure import latency, memory, record
from qpass.measure.bandwidth import measure_bandwidth_gbps
from qpass.runtime.decoder import Decoder
from qpass.runtime.speculate import Speculator

STOCK = "inductor"


def compiled(variant: str, *, release: bool) -> Callable[..., Any]:
    if variant == STOCK:
        return partial(torch.compile, fullgraph=True)
    return qpass.compile(scheme=variant, release_weights=release, fullgraph=True)


def prompt(loaded: Loaded, tokens: int) -> torch.Tensor:
    ids = loaded.tokenizer(inspect.getsource(prompt_source), return_tensors="pt").input_ids
    return ids[:, :tokens]


def bytes_a_token(loaded: Loaded, decoder: Decoder, variant: str) -> int:
    """What decoding one token must read: every linear's weights once (the embedding is a row)."""
    if variant == STOCK:
        seen = {id(m.weight): m.weight for m in loaded.model.modules() if isinstance(m, torch.nn.Linear)}
        return sum(w.numel() * w.element_size() for w in seen.values())
    return qpass.explain(decoder.likely_step).bytes_after


def speed(args: argparse.Namespace) -> list[record.Record]:
    loaded = load(args.model)
    ids = prompt(loaded, args.prompt)
    runs, limits = {}, {}
    bandwidth = max(measure_bandwidth_gbps() for _ in range(3))  # it drifts: a limit is the best of it
    for variant in args.schemes:
        decoder = Decoder(loaded.model, compiled(variant, release=False))
        seconds = decoder.warm_up()
        runs[variant] = partial(Speculator(decoder).generate, ids, max_new_tokens=args.new, eos_token_id=())
        limits[variant] = bytes_a_token(loaded, decoder, variant) / bandwidth / 1e6
        print(f"{variant}: compiled in {seconds:.1f} s, at least {limits[variant]:.1f} ms a token", file=sys.stderr)
    settings = {
        "model": Path(args.model).name,
        "prompt": args.prompt,
        "new": args.new,
        "threads": torch.get_num_threads(),
        "bandwidth_gbps": round(bandwidth, 1),
    }
    return latency.measure(runs, rounds=args.rounds, settings=settings, limits_ms=limits)


def once(args: argparse.Namespace) -> None:
    """One variant in this process: its compile time and its memory, as JSON on stdout."""
    loaded = load(args.model)
    ids = prompt(loaded, args.prompt)
    before = memory.resident_bytes()
    decoder = Decoder(loaded.model, compiled(args.once, release=True))
    started = time.perf_counter()
    decoder.warm_up()
    seconds = time.perf_counter() - started
    Speculator(decoder).generate(ids, max_new_tokens=4, eos_token_id=())
    result = {
        "compile_s": seconds,
        "loaded_mb": before / 1e6,
        "rss_mb": memory.resident_bytes() / 1e6,
        "peak_mb": memory.peak_bytes() / 1e6,
    }
    print(json.dumps(result))


def costs(args: argparse.Namespace) -> list[record.Record]:
    records = []
    for variant in args.schemes:
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
                "QPASS_CACHE": f"{folder}/qpass",
            }
            command = [sys.executable, __file__, args.model, "--once", variant, "--prompt", str(args.prompt)]
            for state in ("cold", "warm"):
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                result = json.loads(done.stdout.splitlines()[-1])
                settings = {"model": Path(args.model).name, "variant": variant}
                records.append(record.Record.of(f"compile_{state}", [result["compile_s"]], "s", settings))
                print(f"{variant} {state}: {result}", file=sys.stderr)
            records.append(record.Record.of("rss", [result["rss_mb"]], "MB", settings))
            records.append(record.Record.of("rss_peak", [result["peak_mb"]], "MB", settings))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument(
        "--schemes", type=lambda text: text.split(","), default=[STOCK, "w8a16", "w4a16-g128", "w4a8-g128"]
    )
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-costs", action="store_true", help="leave compile time and memory out")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.once:
        once(args)
        return
    records = speed(args) + ([] if args.no_costs else costs(args))
    for r in records:
        share = f"  {r.share_of_limit:.0%} of the limit" if r.share_of_limit else ""
        print(
            f"{r.settings['variant']:14} {r.what:13} {r.value:10.1f} {r.unit}  p10 {r.p10:.1f} p90 {r.p90:.1f} n {r.n}{share}"
        )
    if args.output:
        record.append(args.output, records)


if __name__ == "__main__":
    main()
