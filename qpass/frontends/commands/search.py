"""``qpass search``: find each layer's scheme within a budget, and write the recipe."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from qpass.frontends.commands.calibrate import check_output


def search(
    model: str,
    *,
    output: Path,
    budget: str,
    text: Path | None,
    samples: int,
    length: int,
    seed: int,
    stats: Path | None = None,
    alpha: str = "auto",
) -> None:
    """The recipe's explanation goes to stdout. Raises QpassError. Measurements are kept beside ``output``."""
    from qpass.frontends.commands.session import calibration
    from qpass.frontends.hf import locate

    check_output(output, ".json")
    locate(model)
    from qpass.frontends.hf import load
    from qpass.frontends.search import Budget
    from qpass.frontends.search import search as run

    Budget.parse(budget)
    given = calibration(stats, alpha, None)
    loaded = load(model)
    recipe = run(
        loaded.model,
        text,
        budget,
        tokenizer=loaded.tokenizer,
        stats=given["stats"],
        alpha=given["alpha"],
        resume=output.with_name(f".{output.name}.measured"),
        samples=samples,
        length=length,
        seed=seed,
    )
    recipe.save(output)
    Console(highlight=False, soft_wrap=True).print(recipe.explain(), markup=False)
