"""``qpass run``: stream a model's answer, then say what it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from qpass.frontends.commands import session
from qpass.frontends.commands.text import TextStream, encode


def run(
    model: str,
    prompt: str,
    *,
    scheme: str,
    exclude: Sequence[str],
    lowering: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    chat: bool | None,
    keep_weights: bool,
    kv: str | None = None,
) -> None:
    """Text goes to stdout as it comes, everything else to stderr. Raises QpassError."""
    session.check(model, scheme)
    import torch

    from qpass.frontends.hf import load
    from qpass.measure import memory
    from qpass.runtime.sampling import Sampling
    from qpass.runtime.speculate import Speculator

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    loaded = load(model)
    input_ids = encode(loaded.tokenizer, prompt, chat)
    loaded_bytes = memory.resident_bytes()
    compile = session.compiler(scheme, exclude, lowering, release_weights=not keep_weights)
    ready = session.ready(loaded, compile, f"prompt and token step, {scheme}", kv)
    if ready.decoder is None:
        _run_fallback(ready, input_ids, max_new_tokens, sampling, seed, console)
        return
    new = max_new_tokens
    if ready.decoder.context is not None and input_ids.shape[1] < ready.decoder.context:
        new = min(new, ready.decoder.context - input_ids.shape[1])
    if new < max_new_tokens:
        console.print(
            f"[yellow]the model's context of {ready.decoder.context} leaves room for {new} new tokens[/yellow]"
        )
    text = TextStream(loaded.tokenizer)

    def show(tokens: list[list[int]]) -> None:
        sys.stdout.write("".join(map(text.push, tokens[0])))
        sys.stdout.flush()

    generator = None if seed is None else torch.Generator().manual_seed(seed)
    memory_settled = memory.resident_bytes()
    out = Speculator(ready.decoder).generate(
        input_ids, max_new_tokens=new, sampling=sampling, generator=generator, on_tokens=show
    )
    sys.stdout.write(text.end() + "\n")
    sys.stdout.flush()
    count = len(out.new_tokens[0])
    rows = [
        ("tokens", f"{input_ids.shape[1]} prompt + {count} new"),
        ("TTFT", f"{out.ttft_ms:.0f} ms"),
        ("TPOT", f"{out.tpot_ms:.1f} ms, {1e3 / out.tpot_ms:.1f} tokens/s" if count > 1 else "one token only"),
        ("compile", f"{ready.seconds:.1f} s, {out.graphs} graphs"),
        ("linear weights", f"{mb(ready.explanation.bytes_before)} -> {mb(ready.explanation.bytes_after)}"),
        ("memory", f"{mb(loaded_bytes)} loaded, {mb(memory_settled)} compiled, {mb(memory.peak_bytes())} peak"),
    ]
    console.print(_stats(rows))


def mb(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def _stats(rows: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(f"[dim]{name}[/dim]", value)
    return table


def _run_fallback(
    ready: session.Ready, input_ids: Any, new: int, sampling: Any, seed: int | None, console: Console
) -> None:
    """transformers' own loop on the compiled model, for a model that the static cache does not serve."""
    import torch
    from transformers import TextStreamer

    console.print(f"[yellow]{ready.reason}; running transformers' generate() on the compiled model instead[/yellow]")
    if seed is not None:
        torch.manual_seed(seed)
    chosen = (
        {}
        if sampling.greedy
        else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    )
    started = time.perf_counter()
    with torch.no_grad():
        out = ready.fallback.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new,
            do_sample=not sampling.greedy,
            streamer=TextStreamer(ready.loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **chosen,
        )
    count, seconds = out.shape[1] - input_ids.shape[1], time.perf_counter() - started
    console.print(f"[dim]{count} tokens in {seconds:.1f} s, compilation included[/dim]")
