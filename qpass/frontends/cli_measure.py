"""The commands that measure: kernels, profile, eval, bench, and what becomes of their records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from qpass.frontends.cli_options import (
    KV,
    SCHEMES,
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
    with spoken(debug):
        from qpass.frontends.commands import kernels as command

        command.kernels(model, scheme=scheme, exclude=tuple(exclude or ()), tokens=tuple(tokens or (1, 8, 128)))


def profile(
    model: Model,
    scheme: SchemeOption = "w4a16-g128",
    context: Annotated[int, typer.Option(min=1, help="How many tokens stand before what is timed.")] = 512,
    step: Annotated[
        str,
        typer.Option(
            help="What is timed: token, verify:K (K drafted tokens checked at once), or prompt (of --context)."
        ),
    ] = "token",
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
    """Where the time of one step goes: linears by shape, attention, the rest; a table and a picture."""
    with spoken(debug):
        from qpass.frontends.commands import profile as command

        command.profile(
            model,
            scheme=scheme,
            exclude=tuple(exclude or ()),
            lowering=lowering,
            context=context,
            step=step,
            output=output,
            kv=kv,
        )


def evaluate(
    model: Model,
    scheme: Annotated[
        str,
        typer.Option(
            help=f"One or several with commas: {SCHEMES}; bf16 is the model as it is. By default w8a16, or the recipe.",
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
    text: Text = None,
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
    with spoken(debug):
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


def bench(
    model: Model,
    schemes: Annotated[
        str,
        typer.Option(
            help=f"With commas: stock (Inductor, unquantized), stock-frozen (its weights packed: faster, more memory), recipe, {SCHEMES}."
        ),
    ] = ("stock,w8a16,w4a16-g128,w4a8-g128,w8a8-dynamic"),
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
    draft_scheme: DraftScheme = "w8a8-dynamic",
    draft_vocabulary: DraftVocabulary = None,
    k: K = "auto",
    costs: Annotated[
        bool, typer.Option("--costs", help="Also compile time and memory, two processes a variant: takes minutes.")
    ] = False,
    text: Text = None,
    stats: Stats = None,
    stats_with: Annotated[
        str,
        typer.Option(
            help="The schemes that take --stats, with commas; by default all with int8 activations.", show_default=False
        ),
    ] = "",
    alpha: Alpha = "auto",
    recipe: RecipeOption = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Append the records to this .jsonl file.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """How fast: TTFT, TPOT and tokens a second of several variants in turns, beside what the machine allows."""
    with spoken(debug):
        from qpass.frontends.commands import bench as command
        from qpass.frontends.commands.bench_variants import Calibrated, Draft

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
            Calibrated(stats, alpha, recipe, command.words("--stats-with", stats_with) if stats_with else ()),
        )
        command.bench(model, asked, output)


def compare(
    old: Annotated[Path, typer.Argument(help="Records, a .jsonl file.", show_default=False)],
    new: Annotated[Path, typer.Argument(help="Later records of the same things.", show_default=False)],
    tolerance: Annotated[float, typer.Option(min=0.0, help="Below this, a change is none.")] = 0.03,
    debug: Debug = False,
) -> None:
    """What got worse between two files of records, beyond the noise: exit code 1 if anything did."""
    with spoken(debug):
        from qpass.frontends.commands import compare as command

        if not command.compare(old, new, tolerance=tolerance):
            raise typer.Exit(1)


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
    with spoken(debug):
        from qpass.frontends.commands import report as command

        command.report(records, output=output, title=title, pictures=pictures)
