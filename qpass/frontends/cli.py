"""The command ``qpass``: names, options and error messages. What the commands do is in ``commands``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from qpass.frontends import cli_measure
from qpass.frontends.cli_options import (
    KV,
    Alpha,
    Debug,
    DraftScheme,
    DraftVocabulary,
    Exclude,
    K,
    Lowering,
    Model,
    RecipeOption,
    SchemeOption,
    Stats,
    Text,
    spoken,
)

app = typer.Typer(
    name="qpass",
    help="Quantized transformer inference on this CPU, inside PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main() -> None:
    """Quantized transformer inference on this CPU, inside PyTorch."""


@app.command()
def demo(
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "Explain in three sentences why the sky is blue.",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="How many tokens to generate at most.")] = 64,
    debug: Debug = False,
) -> None:
    """SmolLM2-135M-Instruct in bf16, int8 and int4 side by side: text, tokens a second, first token, megabytes."""
    with spoken(debug):
        from qpass.frontends.commands import demo as command

        command.demo(prompt=prompt, max_new_tokens=max_new_tokens)


@app.command()
def run(
    model: Model,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt", "-p", help="The text to continue, or the question to answer; - reads stdin.", show_default=False
        ),
    ],
    scheme: SchemeOption = "w8a16",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; higher is more random.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability; 1 keeps all.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep this many of the likeliest tokens; 0 keeps all.")] = 0,
    seed: Annotated[Optional[int], typer.Option(help="Makes sampling repeatable.", show_default=False)] = None,  # noqa: UP045
    exclude: Exclude = None,
    lowering: Lowering = None,
    chat: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--chat/--no-chat",
            help="Use the tokenizer's chat template. By default where it has one.",
            show_default=False,
        ),
    ] = None,
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="Keep the full-precision weights in memory.")
    ] = False,
    kv: KV = None,
    draft: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Guess ahead and check: a smaller model, ngram, layers:N (the model's own first N), or several with "
            "commas, the first that has a guess.",
            show_default=False,
        ),
    ] = None,
    k: K = "auto",
    draft_scheme: DraftScheme = "w8a8-dynamic",
    draft_vocabulary: DraftVocabulary = None,
    trace: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write a page (.html) that shows who proposed each token.", show_default=False),
    ] = None,
    stats: Stats = None,
    alpha: Alpha = "auto",
    recipe: RecipeOption = None,
    debug: Debug = False,
) -> None:
    """Generate text: it streams to stdout; times and memory follow on stderr."""
    with spoken(debug):
        from qpass.frontends.commands import run as command

        command.run(
            model,
            sys.stdin.read() if prompt == "-" else prompt,
            scheme=scheme,
            exclude=tuple(exclude or ()),
            lowering=lowering,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            chat=chat,
            keep_weights=keep_weights,
            kv=kv,
            draft=draft,
            draft_scheme=draft_scheme,
            draft_vocabulary=draft_vocabulary,
            k=int(k) if k.isdigit() else k,
            trace=trace,
            stats=stats,
            alpha=alpha,
            recipe=recipe,
        )


@app.command()
def explain(
    model: Model,
    scheme: SchemeOption = "w8a16",
    exclude: Exclude = None,
    lowering: Lowering = None,
    full: Annotated[bool, typer.Option("--full", help="One row for each linear, not one for each kind.")] = False,
    stats: Stats = None,
    alpha: Alpha = "auto",
    recipe: RecipeOption = None,
    debug: Debug = False,
) -> None:
    """Compile a model and print what became of each linear: shape, scheme, lowering, bytes, refusals."""
    with spoken(debug):
        from qpass.frontends.commands import explain as command

        command.explain(
            model,
            scheme=scheme,
            exclude=tuple(exclude or ()),
            lowering=lowering,
            full=full,
            stats=stats,
            alpha=alpha,
            recipe=recipe,
        )


@app.command()
def calibrate(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file of statistics to write.", show_default=False)
    ],
    text: Text = None,
    samples: Annotated[int, typer.Option(min=1, help="How many windows of text.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 512,
    hessian: Annotated[bool, typer.Option("--hessian", help="Also keep each channel's sum of squares.")] = False,
    debug: Debug = False,
) -> None:
    """Run a model over some text and keep what its linears read; interrupted, it goes on where it was."""
    with spoken(debug):
        from qpass.frontends.commands import calibrate as command

        command.calibrate(model, output=output, text=text, samples=samples, length=length, hessian=hessian)


@app.command()
def search(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write (.json).", show_default=False)],
    budget: Annotated[
        str, typer.Option(help="ppl<=1% (the fastest within it) or bytes<=30% (the best within it).")
    ] = "ppl<=1%",
    text: Text = None,
    samples: Annotated[int, typer.Option(min=1, help="How many windows of text.")] = 8,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the choice of windows.")] = 0,
    stats: Stats = None,
    alpha: Alpha = "auto",
    debug: Debug = False,
) -> None:
    """Find each layer's scheme within a budget; what was measured is kept, so an interrupted search goes on."""
    with spoken(debug):
        from qpass.frontends.commands import search as command

        command.search(
            model,
            output=output,
            budget=budget,
            text=text,
            samples=samples,
            length=length,
            seed=seed,
            stats=stats,
            alpha=alpha,
        )


@app.command()
def quantize(
    model: Model,
    out: Annotated[
        Path, typer.Argument(help="The folder to write; what is there is replaced all at once.", show_default=False)
    ],
    scheme: SchemeOption = "w4a16-g128",
    algorithm: Annotated[
        str, typer.Option(help="How the codes are found: rtn, clip (both without data), gptq, awq or awq+gptq.")
    ] = "rtn",
    calibration: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Text for gptq and awq, a file or a folder; by default Python's own library.", show_default=False
        ),
    ] = None,
    exclude: Exclude = None,
    debug: Debug = False,
) -> None:
    """Write a quantized model as an artefact, which run, transformers and every other machine read."""
    with spoken(debug):
        from qpass.frontends.commands import quantize as command

        command.quantize(
            model, out, scheme=scheme, algorithm=algorithm, calibration=calibration, exclude=tuple(exclude or ())
        )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A folder that qpass quantize wrote, or any other that transformers serves.")
    ],
) -> None:
    """transformers serve for a quantized model: OpenAI's protocol on localhost:8000; options are passed on (--port, --host)."""
    with spoken(debug=False):
        from qpass.frontends.commands import serve as command

        command.serve(model, context.args)


app.command()(cli_measure.kernels)
app.command()(cli_measure.profile)
app.command("eval")(cli_measure.evaluate)
app.command()(cli_measure.bench)
app.command()(cli_measure.compare)
app.command()(cli_measure.report)


@app.command()
def doctor(debug: Debug = False) -> None:
    """What this machine offers: CPU, instruction sets, caches, bandwidth, compiler, versions, cache folder."""
    with spoken(debug):
        from qpass.frontends.commands import doctor as command

        if not command.doctor():
            raise typer.Exit(1)


if __name__ == "__main__":
    app()
