"""``qpass demo``: one small model in bf16, int8 and int4 side by side."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from qpass.frontends import progress
from qpass.frontends.commands import session
from qpass.frontends.commands.text import encode

PROMPT = "Explain in three sentences why the sky is blue."

VARIANTS = (("bf16", None), ("int8", "w8a16"), ("int4", "w4a16-g64"))
"""int4 in groups of 64: the model's width, 576, is nine of them and four and a half of 128."""

STOCK = "stock torch.compile"
NEW_TOKENS = 64
ROUNDS = 3


@dataclass(frozen=True)
class Outcome:
    label: str
    ttft_ms: float
    tpot_ms: float
    linear_bytes: int
    compile_seconds: float


def demo(*, prompt: str = PROMPT, max_new_tokens: int = NEW_TOKENS) -> None:
    """Prints the texts as panels and the numbers as a table to stdout. Raises QpassError."""
    from qpass.frontends.demo_model import demo_model_path
    from qpass.frontends.hf import load
    from qpass.runtime.speculate import Speculator

    console = Console(highlight=False)
    loaded = load(demo_model_path(), codes=False)
    input_ids = encode(loaded.tokenizer, prompt, None)
    console.print(f"[bold]SmolLM2-135M-Instruct[/bold]: {prompt}")
    console.print(
        "[dim]six graphs are compiled for this machine: minutes at the first run, seconds from then on[/dim]\n"
    )
    contenders: dict[str, session.Ready] = {}
    for label, scheme in VARIANTS:
        compile = session.baseline() if scheme is None else session.compiler(scheme, (), None, release_weights=False)
        ready = session.ready(loaded, compile, f"{label} ({len(contenders) + 1} of {len(VARIANTS)})")
        out = Speculator(ready.decoder).generate(input_ids, max_new_tokens=max_new_tokens)
        text = str(loaded.tokenizer.decode(out.new_tokens[0], skip_special_tokens=True)).strip()
        console.print(Panel(text, title=f"{label}  {scheme or STOCK}", title_align="left"))
        contenders[label] = ready
    with progress.waiting("measuring, in turns"):
        outcomes = _outcomes(contenders, input_ids, max_new_tokens)
    console.print(table(outcomes))
    console.print(
        "[dim]greedy, one prompt, the same static-cache loop for all three; bf16 is stock torch.compile; "
        "MB are those of the linear layers, the head in 8 bits under int4[/dim]"
    )


def _outcomes(contenders: dict[str, session.Ready], input_ids: Any, new: int) -> list[Outcome]:
    """Generate in turns, bf16 int8 int4 bf16 .., so that a drift of the machine hits all alike."""
    from qpass.measure.latency import measure
    from qpass.runtime.speculate import Speculator

    runs = {
        label: functools.partial(Speculator(ready.decoder).generate, input_ids, max_new_tokens=new, eos_token_id=())
        for label, ready in contenders.items()
    }
    found = {(r.what, r.settings["variant"]): r.value for r in measure(runs, rounds=ROUNDS, warm_up=0)}
    before = next(ready.explanation.bytes_before for ready in contenders.values() if ready.explanation)
    return [
        Outcome(
            label=label,
            ttft_ms=found["ttft", label],
            tpot_ms=found["tpot", label],
            linear_bytes=ready.explanation.bytes_after if ready.explanation else before,
            compile_seconds=ready.seconds,
        )
        for label, ready in contenders.items()
    ]


def table(outcomes: list[Outcome]) -> Table:
    """The numbers, and how each compares with the first row."""
    first = outcomes[0]
    shown = Table(title="side by side", title_justify="left")
    shown.add_column("weights")
    for name in ("tokens/s", "speed", "first token", "linear weights", "size", "compile"):
        shown.add_column(name, justify="right", no_wrap=True)
    for o in outcomes:
        shown.add_row(
            o.label,
            f"{1e3 / o.tpot_ms:.1f}",
            f"{first.tpot_ms / o.tpot_ms:.2f}x",
            f"{o.ttft_ms:.0f} ms",
            f"{o.linear_bytes / 1e6:.0f} MB",
            f"{o.linear_bytes / first.linear_bytes:.0%}",
            f"{o.compile_seconds:.0f} s",
        )
    return shown
