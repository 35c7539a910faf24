"""A whole model's steps: one token, a prompt, the check of drafted tokens; and what comes before them, loading and compiling.

    pytest benchmarks/bench_steps.py --benchmark-enable -o python_files=bench_steps.py [--model FOLDER]

``extra_info`` has the bytes that a step must read and its share of the memory's rate, or a prompt's share of the
arithmetic peak, with the limits measured right before the case.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from qpass.frontends.commands import session
from qpass.frontends.commands.bench_costs import measure_costs
from qpass.frontends.commands.bench_variants import STOCK, work_of
from qpass.runtime.decoder import Decoder

SCHEMES = ("stock", "w8a16", "w4a16-g64", "w4a8-g64")  # SmolLM2's width is no multiple of 128
CONTEXT, SMOKE_CONTEXT = 512, 64
PROMPTS = (128, 512)
WIDTHS = (1, 4, 8, 15)


class Ready:
    """One variant's decoder, compiled once for all cases; in smoke mode the model as it is."""

    def __init__(self, loaded: Any, scheme: str, smoke: bool) -> None:
        compile = (
            session.baseline(loaded.model)
            if scheme == STOCK
            else session.compiler(scheme, (), None, release_weights=False)
        )
        self.smoke = smoke
        self.decoder = Decoder(loaded.model, None if smoke else compile)
        self.decoder.warm_up(steps=("prompt", "likeliest", "verify"))
        self.work = work_of(loaded, self.decoder, STOCK if smoke else scheme)
        self.context = SMOKE_CONTEXT if smoke else CONTEXT
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, self.decoder.vocabulary, (1, max(PROMPTS)), generator=generator)
        self.pad = torch.zeros(1, dtype=torch.int64)
        self.cache = self.decoder.allocate(1, max(PROMPTS) + 32)
        self.decoder.prefill(self.ids[:, : self.context], self.pad + self.context, self.cache)


@pytest.fixture(scope="module")
def variants() -> dict[str, Ready]:
    return {}


@pytest.fixture
def ready(loaded: Any, scheme: str, smoke: bool, variants: dict[str, Ready]) -> Ready:
    if scheme not in variants:
        variants[scheme] = Ready(loaded, scheme, smoke)
    return variants[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_token(benchmark: Any, rates: Any, ready: Ready, scheme: str) -> None:
    at, context = ready.pad + ready.context, ready.context
    step = ready.decoder.likeliest
    benchmark.pedantic(
        lambda: step(ready.ids[:, :1], at, ready.pad, ready.cache, context + 1),
        rounds=3 if ready.smoke else 20,
        warmup_rounds=2,
    )
    read = ready.work.token_bytes(context, 1)
    tell(benchmark, read_bytes=round(read), limit_ms=1e3 * read / rates.read_bytes, gbps=rates.read_bytes / 1e9)


@pytest.mark.parametrize("tokens", PROMPTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_prompt(benchmark: Any, rates: Any, ready: Ready, scheme: str, tokens: int) -> None:
    ids, count = ready.ids[:, :tokens], ready.pad + tokens
    benchmark.pedantic(
        lambda: ready.decoder.prefill(ids, count, ready.cache), rounds=2 if ready.smoke else 5, warmup_rounds=1
    )
    tell(benchmark, limit_ms=1e3 * ready.work.prompt_seconds(tokens, 1, rates), peak=ready.work.peak)


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("scheme", [STOCK, "w8a16", "w4a8-g64"])
def test_verification(benchmark: Any, rates: Any, ready: Ready, scheme: str, k: int) -> None:
    at, context = ready.pad + ready.context, ready.context
    check = ready.decoder.verify
    benchmark.pedantic(
        lambda: check(ready.ids[:, : k + 1], at, ready.pad, ready.cache, context + k + 1),
        rounds=2 if ready.smoke else 10,
        warmup_rounds=2,
    )
    read = ready.work.token_bytes(context, 1)
    tell(benchmark, read_bytes=round(read), limit_ms=1e3 * read / rates.read_bytes)


@pytest.mark.parametrize("scheme", ["w4a8-g64"])
def test_compile(benchmark: Any, model_folder: str, scheme: str) -> None:
    """Both graphs of a generation, in a process of its own with empty caches; ``extra_info`` has a warm one and memory."""
    found = benchmark.pedantic(lambda: list(measure_costs(model_folder, scheme, prompt=64)), rounds=1)
    benchmark.extra_info.update({record.what: record.value for record in found})


def test_load(benchmark: Any, model_folder: str, smoke: bool) -> None:
    from transformers import AutoModelForCausalLM

    from qpass.frontends.hf import load

    def run() -> Any:
        if smoke:
            return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
        return load(model_folder).model

    model = benchmark.pedantic(run, rounds=2, warmup_rounds=0)
    benchmark.extra_info["bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())


def test_import(benchmark: Any) -> None:
    """What a process pays before it can do anything: ``import qpass`` with torch behind it."""
    command = [sys.executable, "-c", "import qpass; qpass.compile"]
    benchmark.pedantic(lambda: subprocess.run(command, check=True), rounds=2, warmup_rounds=0)


def tell(benchmark: Any, **info: Any) -> None:
    """Facts of a case, and the share of its limit that the median reached."""
    benchmark.extra_info.update(info)
    if benchmark.stats:  # none when benchmarks are disabled
        benchmark.extra_info["share_of_limit"] = info["limit_ms"] / (1e3 * benchmark.stats.stats.median)
