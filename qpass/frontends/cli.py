"""The command ``qpass``: names, options and error messages. What the commands do is in ``commands``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Optional

import typer

from qpass.errors import QpassError

app = typer.Typer(
    name="qpass",
    help="Quantized transformer inference on this CPU, inside PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_SCHEMES = "w16a16, w8a16, w8a8-dynamic, w8a8-static, w8a8-outlier, w4a16-g32, -g64 or -g128, w4a8-g32, -g64 or -g128, w3a16-g64, w2a16-g32"

Model = Annotated[
    str, typer.Argument(help="A folder with a config.json, a .gguf file, or a hub id.", show_default=False)
]
SchemeOption = Annotated[str, typer.Option(help=f"What the weights are stored as: {_SCHEMES}.")]
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
    str, typer.Option(help="How much smoothing moves into the weights: auto, none or a number from 0 to 1.")
]
RecipeOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--recipe", help="What `qpass search` wrote, in the place of a scheme.", show_default=False),
]
Text = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="A text file or folder; by default the standard library's source.", show_default=False),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, warnings and logs.")]


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
    with _spoken(debug):
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
    k: Annotated[str, typer.Option("--k", help="Tokens that the draft guesses a step: a number, or auto.")] = "auto",
    draft_scheme: Annotated[str, typer.Option(help="The scheme of a draft model.")] = "w8a8-dynamic",
    draft_vocabulary: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Let a draft model guess only its first, most frequent tokens.", show_default=False),
    ] = None,
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
    with _spoken(debug):
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
    with _spoken(debug):
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
    with _spoken(debug):
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
    with _spoken(debug):
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
def kernels(
    model: Model,
    scheme: SchemeOption = "w4a16-g128",
    tokens: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(help="M, tokens at once; may be repeated. By default 1, 8 and 128.", show_default=False),
    ] = None,
    exclude: Exclude = None,
    debug: Debug = False,
) -> None:
    """For each distinct linear: how its kernel walks it, the model's time, the clock's, and the share of the limit."""
    with _spoken(debug):
        from qpass.frontends.commands import kernels as command

        command.kernels(model, scheme=scheme, exclude=tuple(exclude or ()), tokens=tuple(tokens or (1, 8, 128)))


@app.command()
def profile(
    model: Model,
    scheme: SchemeOption = "w4a16-g128",
    context: Annotated[int, typer.Option(min=1, help="How many tokens stand before the one that is timed.")] = 512,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output",
            "-o",
            help="Also draw it, as .png, .svg or .pdf, or append a record, .jsonl.",
            show_default=False,
        ),
    ] = None,
    exclude: Exclude = None,
    lowering: Lowering = None,
    kv: KV = None,
    debug: Debug = False,
) -> None:
    """Where the time of one decode step goes: linears by shape, attention, the rest; a table and a picture."""
    with _spoken(debug):
        from qpass.frontends.commands import profile as command

        command.profile(
            model, scheme=scheme, exclude=tuple(exclude or ()), lowering=lowering, context=context, output=output, kv=kv
        )


@app.command("eval")
def evaluate(
    model: Model,
    scheme: Annotated[
        str,
        typer.Option(
            help=f"One or several with commas: {_SCHEMES}; bf16 is the model as it is. By default w8a16, or the recipe.",
            show_default=False,
        ),
    ] = "",
    tasks: Annotated[
        str, typer.Option(help="Of perplexity, kl (divergence from the full-precision model) and humaneval.")
    ] = "perplexity,kl",
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output",
            "-o",
            help="Add the results to this file of JSON lines, and skip those in it.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A text file or a folder of them; by default Python's standard library.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of the text to score at most.")] = 16384,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    stride: Annotated[int, typer.Option(min=1, help="Tokens that each window scores behind the first.")] = 256,
    problems: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="HumanEval problems, evenly spread; by default all 164.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="HumanEval problems answered at once.")] = 8,
    chat: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--chat/--no-chat",
            help="Ask HumanEval in the tokenizer's chat template. By default where it has one.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer to a HumanEval problem.")] = 512,
    draft: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Guess ahead in HumanEval: a smaller model, ngram or layers:N.", show_default=False),
    ] = None,
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The full-precision model of kl, where MODEL is quantized already.", show_default=False),
    ] = None,
    exclude: Exclude = None,
    lowering: Lowering = None,
    stats: Stats = None,
    alpha: Alpha = "auto",
    recipe: RecipeOption = None,
    debug: Debug = False,
) -> None:
    """Quality, scheme by scheme: perplexity and divergence on text, HumanEval in a sandbox. Interrupted, it goes on."""
    with _spoken(debug):
        from qpass.frontends.commands import eval as command

        command.evaluate(
            command.Asked(
                model,
                tuple(scheme.replace(" ", "").split(",")) if scheme else ("w8a16" if recipe is None else "recipe",),
                tuple(filter(None, tasks.replace(" ", "").split(","))),
                output=output,
                text=text,
                tokens=tokens,
                length=length,
                stride=stride,
                batch=batch,
                problems=problems,
                chat=chat,
                max_new_tokens=max_new_tokens,
                draft=draft,
                exclude=tuple(exclude or ()),
                lowering=lowering,
                reference=reference,
                stats=stats,
                alpha=alpha,
                recipe=recipe,
            )
        )


@app.command()
def bench(
    model: Model,
    schemes: Annotated[str, typer.Option(help=f"With commas: stock (Inductor, unquantized), {_SCHEMES}.")] = (
        "stock,w8a16,w4a16-g128,w4a8-g128,w8a8-dynamic"
    ),
    prompt_len: Annotated[str, typer.Option(help="Tokens of a prompt, with commas.")] = "128",
    batch: Annotated[str, typer.Option(help="Rows at once, with commas.")] = "1",
    new: Annotated[int, typer.Option(min=2, help="Tokens to generate a row.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant takes its turn.")] = 5,
    draft: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Also run with a draft: a smaller model, ngram, layers:N.", show_default=False),
    ] = None,
    draft_with: Annotated[
        str, typer.Option(help="The schemes that run with the draft, with commas; by default all.", show_default=False)
    ] = "",
    draft_scheme: Annotated[str, typer.Option(help="The scheme of a draft model.")] = "w8a8-dynamic",
    draft_vocabulary: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Let a draft model guess only its first, most frequent tokens.", show_default=False),
    ] = None,
    k: Annotated[str, typer.Option("--k", help="Tokens that the draft guesses a step: a number, or auto.")] = "auto",
    costs: Annotated[
        bool, typer.Option("--costs", help="Also compile time and memory, two processes a variant: takes minutes.")
    ] = False,
    text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Where prompts come from; by default Python's own library.", show_default=False),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Append the records to this .jsonl file.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """How fast: TTFT, TPOT and tokens a second of several variants in turns, beside what the machine allows."""
    with _spoken(debug):
        from qpass.frontends.commands import bench as command
        from qpass.frontends.commands.bench_variants import Draft

        asked = command.Asked(
            command.words("--schemes", schemes),
            command.numbers("--prompt-len", prompt_len),
            command.numbers("--batch", batch),
            new,
            rounds,
            None if draft is None else Draft(draft, draft_scheme, draft_vocabulary, int(k) if k.isdigit() else k),
            command.words("--draft-with", draft_with) if draft_with else (),
            costs,
            text,
        )
        command.bench(model, asked, output)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="Records, a .jsonl file.", show_default=False)],
    new: Annotated[Path, typer.Argument(help="Later records of the same things.", show_default=False)],
    tolerance: Annotated[float, typer.Option(min=0.0, help="Below this, a change is none.")] = 0.03,
    debug: Debug = False,
) -> None:
    """What got worse between two files of records, beyond the noise: exit code 1 if anything did."""
    with _spoken(debug):
        from qpass.frontends.commands import compare as command

        if not command.compare(old, new, tolerance=tolerance):
            raise typer.Exit(1)


@app.command()
def report(
    records: Annotated[
        list[Path], typer.Argument(help="Records, .jsonl files or folders of them.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page, .html.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="The page's headline.")] = "Quantized transformers on this CPU",
    pictures: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also write tables (.md) and pictures (.png) into this folder.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Records as one page to look at, that loads nothing: tables, bars, rooflines, quality against bytes."""
    with _spoken(debug):
        from qpass.frontends.commands import report as command

        command.report(records, output=output, title=title, pictures=pictures)


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
    with _spoken(debug):
        from qpass.frontends.commands import quantize as command

        command.quantize(
            model, out, scheme=scheme, algorithm=algorithm, calibration=calibration, exclude=tuple(exclude or ())
        )


@app.command()
def doctor(debug: Debug = False) -> None:
    """What this machine offers: CPU, instruction sets, caches, bandwidth, compiler, versions, cache folder."""
    with _spoken(debug):
        from qpass.frontends.commands import doctor as command

        if not command.doctor():
            raise typer.Exit(1)


@contextlib.contextmanager
def _spoken(debug: bool) -> Iterator[None]:
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


if __name__ == "__main__":
    app()
