"""``qpass profile``: where the time of a step goes, as a table and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from qpass.errors import OptionError
from qpass.frontends.commands import session

if TYPE_CHECKING:
    from qpass.runtime.decoder import Decoder

WARM_UP, TOKENS, PROMPTS = 4, 16, 4
"""Steps that are run before the timed ones, and those: of tokens, of prompts."""


def profile(
    model: str,
    *,
    scheme: str,
    exclude: Sequence[str],
    lowering: str | None,
    context: int,
    step: str = "token",
    output: Path | None,
    kv: str | None = None,
) -> None:
    """The table goes to stdout, the picture (or a Record, .jsonl) to ``output``. Raises QpassError."""
    session.check(model, scheme)
    import torch

    from qpass.errors import UnsupportedError
    from qpass.frontends.hf import load
    from qpass.measure import pictures
    from qpass.measure.bandwidth import measure_bandwidth_gbps
    from qpass.measure.profile import named_kernels, profile_steps
    from qpass.measure.record import append

    if output is not None and output.suffix not in (".png", ".svg", ".pdf", ".jsonl"):
        raise OptionError(f"--output {output}: accepted are .png, .svg and .pdf, and .jsonl for a record")
    drafted = _drafted(step, context)
    loaded = load(model)
    steps = TOKENS if drafted is not None else PROMPTS
    compile = session.compiler(scheme, exclude, lowering, release_weights=True)
    with named_kernels():
        ready = session.ready(loaded, compile, f"prompt and token step, {scheme}", kv)
    decoder = ready.decoder
    if decoder is None:
        raise UnsupportedError(ready.reason or f"{model} can't be decoded on a static cache")
    with torch.no_grad(), named_kernels():
        run = _run(decoder, context, drafted)
        run(0)  # compiles what is new
        found = profile_steps(run, steps, WARM_UP)
    bandwidth = measure_bandwidth_gbps()
    what = f"{Path(model).name}, {scheme}: {_title(drafted, context)}"
    console = Console(highlight=False)
    table = Table(
        title=f"{what}, {found.step_ms:.1f} ms",
        title_justify="left",
    )
    for column in ("part", "ms", "share", "calls", "GB/s", "of the memory's"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in found.parts:
        table.add_row(part.name, f"{part.ms:.2f}", f"{part.share(found.step_ms):.1%}", f"{part.calls:.0f}", "", "")
        if part.name == "linear":
            for line in found.linears:
                table.add_row(
                    f"  {line.name}",
                    f"{line.ms:.2f}",
                    f"{line.share(found.step_ms):.1%}",
                    f"{line.calls:.0f}",
                    f"{line.read_gbps:.1f}",
                    f"{line.read_gbps / bandwidth:.0%}",
                )
    console.print(table)
    console.print(
        f"outside of the linears: {found.outside_linears:.1%}; the memory reads {bandwidth:.1f} GB/s",
        markup=False,
    )
    if output is not None and output.suffix == ".jsonl":
        about = {
            "model": Path(model).name,
            "scheme": scheme,
            "step": step,
            "context": context,
            "threads": torch.get_num_threads(),
        }
        append(output, [found.record(about | {"bandwidth_gbps": round(bandwidth, 1)})])
        console.print(f"record: {output}", markup=False)
    elif output is not None:
        pictures.draw_profile(
            found,
            f"{what} takes {found.step_ms:.1f} ms",
            output,
        )
        console.print(f"picture: {output}", markup=False)


def _drafted(step: str, context: int) -> int | None:
    """How many drafted tokens a step checks, 0 for none; None for a prompt. Raises OptionError."""
    from qpass.runtime.verify import MOST

    kind, _, count = step.partition(":")
    if step == "prompt" and context >= 2:
        return None
    if step == "token":
        return 0
    if kind == "verify" and count.isdigit() and 1 <= int(count) < MOST:
        return int(count)
    raise OptionError(
        f"--step {step}: accepted are token, prompt (of --context 2 or more) and verify:1 to verify:{MOST - 1}"
    )


def _title(drafted: int | None, context: int) -> str:
    if drafted is None:
        return f"a prompt of {context}"
    return f"{f'{drafted} drafted tokens checked' if drafted else 'one token'} at a context of {context}"


def _run(decoder: Decoder, context: int, drafted: int | None) -> Callable[[int], Any]:
    """Step i, at a context of ``context + i``, or a prompt. Raises OptionError where the model has no room for it."""
    import torch

    room = context if drafted is None else context + drafted + 1 + 2 * TOKENS + WARM_UP
    if decoder.context is not None and room > decoder.context:
        raise OptionError(
            f"--context {context}: the model's context of {decoder.context} leaves room for {decoder.context - (room - context)}"
        )
    cache = decoder.allocate(1, room)
    vocabulary = decoder.model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, context), generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(1, dtype=torch.int64)
    if drafted is None:
        return lambda i: decoder.prefill(ids, zero + context, cache)
    block = ids[:, :1].repeat(1, drafted + 1)
    step = decoder.verify if drafted else decoder.likeliest
    decoder.prefill(ids, zero + context, cache)
    return lambda i: step(block, zero + context + i, zero, cache, context + i + drafted + 1)
