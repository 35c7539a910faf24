"""What the commands share: options that several take, and how an error is told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Optional

import typer

from qpass.errors import QpassError

SCHEMES = "w16a16, w8a16, w8a8-dynamic, w8a8-static, w8a8-outlier, w4a16-g32, -g64 or -g128, w4a8-g32, -g64 or -g128, w3a16-g64, w2a16-g32"

Model = Annotated[
    str, typer.Argument(help="A folder with a config.json, a .gguf file, or a hub id.", show_default=False)
]
SchemeOption = Annotated[str, typer.Option(help=f"What the weights are stored as: {SCHEMES}.")]
Exclude = Annotated[
    Optional[list[str]],  # noqa: UP045  typer reads the annotation at run time
    typer.Option(
        help="A module pattern to leave as it is, such as 'lm_head' or 'model.layers.0.*'; may be repeated.",
        show_default=False,
    ),
]
Lowering = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="The only lowering to use: generated, onednn, aten or reference. By default the first that can.",
        show_default=False,
    ),
]
KV = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="int8 halves the memory of cached keys and values; by default they have the model's dtype.",
        show_default=False,
    ),
]
Stats = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        help="What `qpass calibrate` wrote: smooths int8 activations, and scales static ones.", show_default=False
    ),
]
Alpha = Annotated[
    str,
    typer.Option(
        help="How much smoothing moves into the weights: auto (rotates inputs, too, where that pays), none or a number from 0 to 1."
    ),
]
RecipeOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--recipe", help="What `qpass search` wrote, in the place of a scheme.", show_default=False),
]
K = Annotated[str, typer.Option("--k", help="Tokens that the draft guesses a step: a number, or auto.")]
DraftScheme = Annotated[str, typer.Option(help="The scheme of a draft model.")]
DraftVocabulary = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        min=1,
        help="Let a draft guess only its first, most frequent tokens and the text's rare ones.",
        show_default=False,
    ),
]
Text = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="A text file or folder; by default the standard library's source.", show_default=False),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, warnings and logs.")]


@contextlib.contextmanager
def spoken(debug: bool) -> Iterator[None]:
    """Prepare the process; an error of ours becomes one sentence on stderr and exit code 2."""
    try:
        from qpass.frontends.commands import session

        session.prepare(debug=debug)
        yield
    except QpassError as error:
        if debug:
            raise
        _complain(str(error).partition("\n\n")[0])  # behind the blank line is what Dynamo adds for its own developers
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _complain(message: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", style="red", markup=False)
