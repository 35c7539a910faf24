"""What quantization costs in perplexity, by bits, group and algorithm, on text that nothing was calibrated on.

    python benchmarks/quantization.py MODEL --cells w4a16-g128:rtn,gptq,awq --cells w3a16-g64:rtn,gptq
    python benchmarks/quantization.py MODEL --grid            # bits 2, 3, 4 x groups 16, 32, 64, 128, rtn and gptq
    python benchmarks/quantization.py --report FILE           # the records of a file as tables

The codes' values are put into the model, which runs in bf16 without compilation: nothing but the weights differs. Cells that
are in the output file are skipped, and a cell that was interrupted goes on behind its last finished block.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpass
from qpass.frontends import progress
from qpass.measure.corpus import read_text, windows
from qpass.measure.perplexity import Perplexity
from qpass.measure.record import Record, append, read

LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder for transformers")
    parser.add_argument("--cells", action="append", default=[], help="scheme:algorithm[,algorithm...]; may be repeated")
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--calibration", type=int, default=32, help=f"windows of {LENGTH} tokens")
    parser.add_argument("--evaluation", type=int, default=32, help=f"windows of {LENGTH} tokens")
    parser.add_argument("--work", type=Path, help="keeps finished blocks, so that an interrupted cell goes on")
    parser.add_argument("--output", type=Path, help="JSON lines to append to")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    if arguments.report is not None:
        print(report(list(read(arguments.report))))
        return
    cells = [
        (scheme, a) for cell in arguments.cells for scheme, _, names in [cell.partition(":")] for a in names.split(",")
    ]
    if arguments.grid:
        cells += [(f"w{b}a16-g{g}", a) for b in (4, 3, 2) for g in (128, 64, 32, 16) for a in ("rtn", "gptq")]
    progress.shown.set(True)
    output = arguments.output or Path("quantization.jsonl")
    for scheme, algorithm in [("w16a16", "none"), *cells]:
        wanted = _settings(arguments, scheme, algorithm)
        done = list(read(output)) if output.exists() else []
        if any(record.settings.get("cell") == wanted["cell"] for record in done):
            continue
        append(output, [measure(arguments, wanted)])
        print(report(list(read(output))), flush=True)


def _settings(arguments: argparse.Namespace, scheme: str, algorithm: str) -> dict:
    free = algorithm in ("none", "rtn", "clip")
    settings = {
        "model": Path(arguments.model).name,
        "scheme": scheme,
        "algorithm": algorithm,
        "calibration_tokens": 0 if free else arguments.calibration * LENGTH,
        "evaluation_tokens": arguments.evaluation * LENGTH,
        "text": "standard library, disjoint modules",
    }
    return settings | {"cell": "/".join(str(value) for value in settings.values())}


@torch.no_grad()
def measure(arguments: argparse.Namespace, settings: dict) -> Record:
    """Quantize one cell and measure it."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval().requires_grad_(False)
    start = time.monotonic()
    if settings["algorithm"] != "none":
        work = arguments.work or Path(tempfile.mkdtemp())
        qpass.quantize(
            model,
            scheme=settings["scheme"],
            algorithm=settings["algorithm"],
            tokenizer=tokenizer,
            length=LENGTH,
            count=arguments.calibration,
            folder=work / settings["cell"].replace("/", "_").replace(" ", "_"),
            write_back=True,
        )
    seconds = time.monotonic() - start
    ids = tokenizer(
        read_text(None, "evaluation"), return_tensors="pt", add_special_tokens=False, verbose=False
    ).input_ids
    found = Perplexity()
    for window in windows(ids[0], LENGTH, arguments.evaluation):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        found.add(logits.float().log_softmax(-1), window[1:])
    return found.records(settings | {"quantize_s": round(seconds, 1)})[0]


def report(records: list[Record]) -> str:
    """A table a model: perplexity, and its growth over the model as it was."""
    lines = []
    for model in dict.fromkeys(record.settings["model"] for record in records):
        own = {(r.settings["scheme"], r.settings["algorithm"]): r for r in records if r.settings["model"] == model}
        plain = own.get(("w16a16", "none"))
        if plain is None:
            continue
        algorithms = list(dict.fromkeys(algorithm for _, algorithm in own if algorithm != "none"))
        tokens = max(r.settings["calibration_tokens"] for r in own.values())
        lines += [
            f"{model}, {plain.settings['evaluation_tokens']} tokens of {plain.settings['text']}, bf16 {plain.value:.3f}, "
            f"calibrated on {tokens} tokens, commit {plain.commit}:",
            "",
            "| scheme | " + " | ".join(algorithms) + " |",
            "|---|" + "---:|" * len(algorithms),
        ]
        for scheme in dict.fromkeys(scheme for scheme, _ in own if scheme != "w16a16"):
            cells = [own.get((scheme, algorithm)) for algorithm in algorithms]
            shown = ["-" if c is None else f"{c.value:.3f} ({100 * (c.value / plain.value - 1):+.1f}%)" for c in cells]
            lines.append(f"| `{scheme}` | " + " | ".join(shown) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
