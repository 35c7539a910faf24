"""What quantization costs in perplexity and KL divergence, by bits, group and algorithm, on text that nothing was calibrated on.

    python benchmarks/quantization.py MODEL --cells w4a16-g128:rtn,gptq,awq --cells w3a16-g64:rtn,gptq
    python benchmarks/quantization.py MODEL --grid            # bits 2, 3, 4 x groups 16, 32, 64, 128, rtn and gptq
    python benchmarks/quantization.py --report FILE           # the records of a file as tables

The codes' values are put into the model, which runs in bf16 without compilation: nothing but the weights differs. Perplexity of one
text may fall by chance where weights change; KL divergence from the unquantized model can't, so it compares algorithms. Cells that
are in the output file are skipped, and a cell that was interrupted goes on behind its last finished block.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpass
from qpass.frontends import progress
from qpass.measure.corpus import read_text, windows
from qpass.measure.divergence import Divergence
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
        append(output, measure(arguments, wanted))
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
def measure(arguments: argparse.Namespace, settings: dict) -> list[Record]:
    """Quantize one cell and measure it."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = _load(arguments.model)
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
    found, apart = Perplexity(), Divergence()
    original = None if settings["algorithm"] == "none" else _load(arguments.model)
    for window in windows(ids[0], LENGTH, arguments.evaluation):
        predicted = _log_probabilities(model, window)
        found.add(predicted, window[1:])
        if original is not None:
            apart.add(_log_probabilities(original, window), predicted)
    settings = settings | {"quantize_s": round(seconds, 1)}
    return found.records(settings) + ([] if original is None else apart.records(settings))


def _load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().requires_grad_(False)


def _log_probabilities(model: Any, window: torch.Tensor) -> torch.Tensor:
    """fp32 [L - 1, V]: at each token but the last."""
    logits: torch.Tensor = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


def report(records: list[Record]) -> str:
    """A table a model: perplexity, its growth over the model as it was, and KL divergence from it in thousandths of a nat."""
    lines = []
    for model in dict.fromkeys(record.settings["model"] for record in records):
        what: dict[str, dict[tuple[str, str], Record]] = {"perplexity": {}, "kl": {}}
        for record in records:
            if record.settings["model"] == model and record.what in what:
                what[record.what][record.settings["scheme"], record.settings["algorithm"]] = record
        own = what["perplexity"]
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
            shown = [_cell(own.get((scheme, a)), what["kl"].get((scheme, a)), plain) for a in algorithms]
            lines.append(f"| `{scheme}` | " + " | ".join(shown) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(perplexity: Record | None, kl: Record | None, plain: Record) -> str:
    if perplexity is None:
        return "-"
    told = f"{perplexity.value:.3f} ({100 * (perplexity.value / plain.value - 1):+.1f}%)"
    return told if kl is None else f"{told}, {1000 * kl.value:.1f}"


if __name__ == "__main__":
    main()
