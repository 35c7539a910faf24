"""What a variant costs before its first token: loading, compiling cold and warm, and the memory of each stage.

python -m qpass.frontends.commands.bench_costs MODEL VARIANT PROMPT     one variant in this process, as JSON on stdout
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qpass.errors import QpassError
from qpass.frontends.commands.bench_variants import BASELINES, FROZEN, RECIPE, Calibrated

NEW = 8


def measure_costs(model: str, variant: str, *, prompt: int, calibrated: Calibrated | None = None) -> Iterator[Any]:
    """Records of one variant: ``load``, ``compile_cold`` and ``compile_warm`` in s, ``peak_load``, ``peak_compile``,
    ``peak_run`` and ``rss`` in MB. Two processes, the first with empty caches. Raises QpassError with what went wrong."""
    from qpass.measure.record import Record

    found_by = calibrated or Calibrated()
    settings = {"model": Path(model).name, "variant": found_by.name(variant)}
    with tempfile.TemporaryDirectory(prefix="qpass-bench-") as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "QPASS_CACHE": f"{folder}/qpass"}
        command = [sys.executable, "-m", __spec__.name, model, variant, str(prompt)]
        command += [str(found_by.stats_for(variant) or ""), found_by.alpha, str(found_by.recipe or "")]
        for state in ("cold", "warm"):
            done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise QpassError(f"{variant} ended with code {done.returncode}: {last}")
            found = json.loads(done.stdout.splitlines()[-1])
            yield Record.of(f"compile_{state}", [found.pop("compile")], "s", settings)
    yield Record.of("load", [found.pop("load")], "s", settings)
    for what, megabytes in found.items():
        yield Record.of(what, [megabytes], "MB", settings)


def once(model: str, variant: str, prompt: int, calibrated: Calibrated) -> dict[str, float]:
    """This process' own: seconds of ``load`` and ``compile``; MB held at most in each stage, and in the end."""
    from qpass.frontends.commands import session

    session.prepare()
    session.check(model, "w16a16" if variant in (*BASELINES, RECIPE) else variant)
    from functools import partial

    import torch

    import qpass
    from qpass.frontends.hf import load
    from qpass.measure import memory
    from qpass.runtime.decoder import Decoder
    from qpass.runtime.speculate import Speculator

    found: dict[str, float] = {}

    def stage(name: str) -> None:
        found[f"peak_{name}"] = memory.peak_bytes() / 1e6
        memory.reset_peak()

    memory.reset_peak()
    started = time.perf_counter()
    loaded = load(model)
    found["load"] = time.perf_counter() - started
    stage("load")
    if variant in BASELINES:
        compile = session.baseline(loaded.model, frozen=variant == FROZEN)
    else:
        compile = partial(qpass.compile, release_weights=True, fullgraph=True, dynamic=False, **calibrated.of(variant))
    decoder = Decoder(loaded.model, compile)
    found["compile"] = decoder.warm_up()
    stage("compile")
    ids = torch.randint(0, decoder.vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    Speculator(decoder).generate(ids, max_new_tokens=NEW, eos_token_id=())
    stage("run")
    found["rss"] = memory.resident_bytes() / 1e6
    return found


if __name__ == "__main__":
    model, variant, prompt, stats, alpha, recipe = sys.argv[1:7]
    chosen = Calibrated(Path(stats) if stats else None, alpha, Path(recipe) if recipe else None)
    print(json.dumps(once(model, variant, int(prompt), chosen)))
