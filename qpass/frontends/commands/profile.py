"""``qpass profile``: where the time of a decode step goes, as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qpass.frontends.commands import session


def profile(
    model: str,
    *,
    scheme: str,
    exclude: Sequence[str],
    lowering: str | None,
    context: int,
    output: Path | None,
    kv: str | None = None,
) -> None:
    """The table goes to stdout, the picture (or a Record, .jsonl) to ``output``. Raises QpassError."""
    session.check(model, scheme)
    import torch

    from qpass.errors import OptionError, UnsupportedError
    from qpass.frontends.hf import load
    from qpass.measure import pictures
    from qpass.measure.bandwidth import measure_bandwidth_gbps
    from qpass.measure.profile import named_kernels, profile_steps
    from qpass.measure.record import append

    if output is not None and output.suffix not in (".png", ".svg", ".pdf", ".jsonl"):
        raise OptionError(f"--output {output}: accepted are .png, .svg and .pdf, and .jsonl for a record")
    loaded = load(model)
    steps, warm_up = 16, 4
    compile = session.compiler(scheme, exclude, lowering, release_weights=True)
    with named_kernels():
        ready = session.ready(loaded, compile, f"prompt and token step, {scheme}", kv)
    decoder = ready.decoder
    if decoder is None:
        raise UnsupportedError(ready.reason or f"{model} can't be decoded on a static cache")
    room = context + 2 * steps + warm_up
    if decoder.context is not None and room > decoder.context:
        raise OptionError(
            f"--context {context}: the model's context of {decoder.context} leaves room for {decoder.context - 2 * steps - warm_up}"
        )
    cache = decoder.allocate(1, room)
    ids = torch.randint(
        0, decoder.model.config.get_text_config().vocab_size, (1, context), generator=torch.Generator().manual_seed(0)
    )
    pad = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        decoder.prefill(ids, pad + context, cache)

        def step(i: int) -> None:
            position = torch.full((1,), context + i, dtype=torch.int64)
            decoder.likeliest(ids[:, :1], position, pad, cache, context + i + 1)

        found = profile_steps(step, steps, warm_up)
    bandwidth = measure_bandwidth_gbps()
    console = Console(highlight=False)
    table = Table(
        title=f"{Path(model).name}, {scheme}: one token at a context of {context}, {found.step_ms:.1f} ms",
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
        about = {"model": Path(model).name, "scheme": scheme, "context": context, "threads": torch.get_num_threads()}
        append(output, [found.record(about | {"bandwidth_gbps": round(bandwidth, 1)})])
        console.print(f"record: {output}", markup=False)
    elif output is not None:
        pictures.draw_profile(
            found,
            f"{Path(model).name}, {scheme}: one token at a context of {context} takes {found.step_ms:.1f} ms",
            output,
        )
        console.print(f"picture: {output}", markup=False)
