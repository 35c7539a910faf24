"""``qpass explain``: compile a model's token step and print what became of each linear."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from qpass.frontends.commands import session


def explain(
    model: str,
    *,
    scheme: str,
    exclude: Sequence[str],
    lowering: str | None,
    full: bool,
    stats: Path | None = None,
    alpha: str = "auto",
    recipe: Path | None = None,
) -> None:
    """The table goes to stdout. Raises QpassError."""
    session.check(model, scheme)
    asked = session.chosen(scheme, stats, alpha, recipe)
    import torch

    import qpass
    from qpass.errors import UnsupportedError
    from qpass.frontends import progress
    from qpass.frontends.hf import load
    from qpass.runtime.decoder import Decoder

    loaded = load(model)
    compile = session.compiler(
        asked.pop("scheme"),
        exclude,
        lowering,
        release_weights=False,
        **asked,
    )
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    whole = compile(loaded.model)  # checks the patterns against the modules
    with progress.waiting(f"compiling the token step, {scheme}"), torch.no_grad():
        try:
            decoder = Decoder(loaded.model, compile)
            session.tell_attention(decoder)
        except UnsupportedError as error:
            errors.print(f"[yellow]{error}; explaining the plain forward instead[/yellow]")
            compiled = whole
            compiled(torch.zeros(1, 4, dtype=torch.int64))
        else:
            compiled = decoder.likely_step
            zero = torch.zeros(1, dtype=torch.int64)
            decoder.likeliest(zero[:, None], zero, zero, decoder.allocate(1, 2), 1)
    explanation = qpass.explain(compiled)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)  # a file or a pipe has no width of its own to fold into
    console.print(explanation.table(full=full))
    for line in explanation.footnotes():
        console.print(line, markup=False, soft_wrap=True)
