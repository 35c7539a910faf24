"""``qpass run``: stream a model's answer, then say what it took."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from qpass.errors import OptionError, UnsupportedError
from qpass.frontends import progress
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
    draft: str | None = None,
    draft_scheme: str = "w8a8-dynamic",
    draft_vocabulary: int | None = None,
    k: int | str = "auto",
    trace: Path | None = None,
    stats: Path | None = None,
    alpha: str = "auto",
    recipe: Path | None = None,
) -> None:
    """Text goes to stdout as it comes, everything else to stderr. Raises QpassError."""
    if trace is not None and (trace.suffix != ".html" or not trace.parent.is_dir()):
        raise OptionError(f"--trace {trace}: accepted is a file .html in a folder that exists")
    session.check(model, scheme)
    asked = session.chosen(scheme, stats, alpha, recipe)
    import torch

    from qpass.frontends.hf import load
    from qpass.frontends.speculation import Speculation
    from qpass.frontends.trace import shown, write_trace
    from qpass.measure import memory
    from qpass.runtime.sampling import Sampling

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    loaded = load(model)
    input_ids = encode(loaded.tokenizer, prompt, chat)
    loaded_bytes = memory.resident_bytes()
    compile = session.compiler(
        asked.pop("scheme"),
        exclude,
        lowering,
        release_weights=not keep_weights,
        **asked,
    )
    whole = compile(loaded.model)  # costs nothing before its first call, but checks the patterns against the modules
    try:
        spec = Speculation(
            whole,
            _drafts(draft),
            k=cast(Any, k),  # anything else is refused there
            kv_dtype=kv,
            tokenizer=loaded.tokenizer,
            draft_scheme=draft_scheme,
            draft_vocabulary=draft_vocabulary,
        )
    except UnsupportedError as error:
        if draft is not None:
            raise
        _run_fallback(loaded, whole, str(error), input_ids, max_new_tokens, sampling, seed, console)
        return
    decoder = spec.decoder
    session.tell_attention(decoder)
    with progress.waiting(f"compiling {scheme}"):
        seconds = spec.warm_up(greedy=sampling.greedy)
    new = max_new_tokens
    if decoder.context is not None and input_ids.shape[1] < decoder.context:
        new = min(new, decoder.context - input_ids.shape[1])
    if new < max_new_tokens:
        console.print(f"[yellow]the model's context of {decoder.context} leaves room for {new} new tokens[/yellow]")
    text = TextStream(loaded.tokenizer)

    def show(tokens: list[list[int]]) -> None:
        sys.stdout.write("".join(map(text.push, tokens[0])))
        sys.stdout.flush()

    generator = None if seed is None else torch.Generator().manual_seed(seed)
    memory_settled = memory.resident_bytes()
    out = spec.speculator.generate(
        input_ids, max_new_tokens=new, sampling=sampling, generator=generator, on_tokens=show
    )
    sys.stdout.write(text.end() + "\n")
    sys.stdout.flush()
    count, explanation = len(out.new_tokens[0]), spec.explain()
    rows = [
        ("tokens", f"{input_ids.shape[1]} prompt + {count} new"),
        ("TTFT", f"{out.ttft_ms:.0f} ms"),
        ("TPOT", f"{out.tpot_ms:.1f} ms, {1e3 / out.tpot_ms:.1f} tokens/s" if count > 1 else "one token only"),
        ("compile", f"{seconds:.1f} s, {out.graphs} graphs"),
        ("linear weights", f"{mb(explanation.bytes_before)} -> {mb(explanation.bytes_after)}"),
        ("memory", f"{mb(loaded_bytes)} loaded, {mb(memory_settled)} compiled, {mb(memory.peak_bytes())} peak"),
    ]
    if draft is not None:
        rows += [row for row in spec.stats.table() if row[0] not in ("new tokens", "speed")]
        rows.insert(1, ("steps", f"{len(spec.stats.rounds) + 1}, {spec.stats.tokens_a_step:.2f} tokens a step"))
    console.print(_stats(rows))
    if trace is not None:
        decode = functools.partial(loaded.tokenizer.decode, clean_up_tokenization_spaces=False)
        write_trace(
            trace,
            [shown(spec.stats.pieces[0], lambda ids: str(decode(ids)))],
            spec.stats.rounds,
            title=f"{Path(model).name}, {scheme}, draft: {draft or 'none'}",
            prompts=[str(decode(input_ids[0]))],
            switches=spec.stats.switches,
        )
        console.print(f"[dim]trace: {trace}[/dim]")


def _drafts(given: str | None) -> Any:
    """ "ngram,layers:8" as a list, in the order of asking; one name as it is."""
    names = [name.strip() for name in given.split(",") if name.strip()] if given is not None else []
    return names if len(names) > 1 else names[0] if names else None


def mb(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def _stats(rows: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(f"[dim]{name}[/dim]", value)
    return table


def _run_fallback(
    loaded: Any, compiled: Any, reason: str, input_ids: Any, new: int, sampling: Any, seed: int | None, console: Console
) -> None:
    """transformers' own loop on the compiled model, for a model that the static cache does not serve."""
    import torch
    from transformers import TextStreamer

    console.print(f"[yellow]{reason}; running transformers' generate() on the compiled model instead[/yellow]")
    if seed is not None:
        torch.manual_seed(seed)
    chosen = (
        {}
        if sampling.greedy
        else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    )
    started = time.perf_counter()
    with torch.no_grad():
        out = compiled.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new,
            do_sample=not sampling.greedy,
            streamer=TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **chosen,
        )
    count, seconds = out.shape[1] - input_ids.shape[1], time.perf_counter() - started
    console.print(f"[dim]{count} tokens in {seconds:.1f} s, compilation included[/dim]")
