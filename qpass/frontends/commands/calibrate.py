"""``qpass calibrate``: run a model over some text and write what its linears read."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from qpass.errors import OptionError


def calibrate(model: str, *, output: Path, text: Path | None, samples: int, length: int, hessian: bool) -> None:
    """Raises QpassError. What was seen is kept beside ``output`` on the way, so that the same command goes on with it."""
    from qpass.frontends.hf import locate

    check_output(output, ".safetensors")
    locate(model)
    from qpass.frontends.batches import read_batches
    from qpass.frontends.calibrate import calibrate as run
    from qpass.frontends.hf import load

    loaded = load(model)
    batches = list(read_batches(text, loaded.tokenizer, length=length, count=samples))
    settings = f"{text or 'standard library'}, {samples} x {length}, hessian {hessian}"
    partial = output.with_name(f".{output.name}.partial")
    stats = run(loaded.model, batches, hessian=hessian, resume=partial, settings=settings)
    stats.save(output)
    inputs, linears = len(stats.inputs), len(stats.linears)
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"{output}: {stats.tokens} tokens, {inputs} inputs of {linears} linears, {output.stat().st_size / 1e6:.1f} MB"
    )


def check_output(output: Path, suffix: str) -> None:
    if output.suffix != suffix or not output.parent.is_dir():
        raise OptionError(f"--output {output}: accepted is a file {suffix} in a folder that exists")
