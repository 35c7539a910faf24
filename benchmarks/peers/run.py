"""Peers and ours side by side: same prompt ids, same number of greedy tokens, same threads, same clock, in turns.

    python benchmarks/peers/run.py MODEL [--prompt-len 128,1024] [--new 64] [--rounds 5] [--ours stock,w8a16,w4a8-g128,w4a8-g128+DRAFT]
                                   [--peers torch:inductor,llama:Q4_0,openvino:int4+DRAFT,...] [-o benchmarks/results/NAME.jsonl]

Every variant is a process of its own that keeps its model; all but the one whose turn it is are stopped, so that no
thread of theirs spins. What can't be installed, loaded or run becomes a row that says why.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from install import PEERS, folder, why_not

from qpass.cpu import detect
from qpass.frontends.commands.bench import prompt_ids
from qpass.frontends.hf import Loaded
from qpass.measure.bench import Contender, Outcome, measure_case
from qpass.measure.bench_table import table
from qpass.measure.record import Record, append

HERE = Path(__file__).parent
LOADING_S, COMPILING_S, ANSWER_S = 1800, 900, 180
"""The slowest engine that is measured answers in a minute; one that doesn't in three is a row that says so."""


class Refused(RuntimeError):
    """A peer that does not run, with the reason; ``title`` is its row's, where it ran before."""

    title = ""


class Process:
    """One variant behind the interface of serve.py; stopped between its turns."""

    def __init__(self, name: str, command: list[str], work: Path) -> None:
        self.name, self.log = name, work / f"{name.replace(' ', '-').replace('/', '-')}.log"
        variables = {"OMP_NUM_THREADS": command[-2], "MKL_NUM_THREADS": command[-2], "TOKENIZERS_PARALLELISM": "false"}
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True, env=os.environ | variables,
        )  # fmt: skip
        self.tokens: list[int] = []
        try:
            self.about = self._read(LOADING_S)["ready"]
        except BaseException:
            self.end()
            raise
        self._signal(signal.SIGSTOP)

    def _signal(self, which: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child.pid, which)

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self.child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.child.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                self.child.kill()  # a late answer would be taken for the next one
                raise Refused(f"no answer within {seconds:.0f} s")
        line = self.child.stdout.readline()
        if not line:
            if (code := self.child.wait()) < 0:
                why = ", as the kernel does where memory runs out" if -code == signal.SIGKILL else ""
                raise Refused(f"was ended by {signal.Signals(-code).name}{why}")
            last = [text for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            raise Refused(last[-1].strip()[:300] if last else f"ended with code {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"][:300])
        return answer

    def warm_up(self, ids: Any, new: int) -> None:
        """A generation that may compile first."""
        self._generate(ids, new, COMPILING_S)

    def generate(self, ids: Any, new: int) -> Outcome:
        """One generation of one row."""
        return self._generate(ids, new, ANSWER_S)

    def _generate(self, ids: Any, new: int, patience_s: float) -> Outcome:
        assert self.child.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self.child.stdin.write(json.dumps({"prompt": ids[0].tolist(), "new": new}) + "\n")
            self.child.stdin.flush()
            answer = self._read(patience_s)
        except BrokenPipeError:
            raise self._refused(f"ended with code {self.child.wait()}") from None
        except Refused as error:
            raise self._refused(str(error)) from None
        finally:
            time.sleep(0.25)  # its threads spin for a while behind their work
            self._signal(signal.SIGSTOP)
        times, self.tokens = answer["times"], answer["tokens"]
        if len(times) != new:
            raise self._refused(f"gave {len(times)} tokens instead of {new}")
        return Outcome(1e3 * times[0], 1e3 * (times[-1] - times[0]) / (new - 1))

    def _refused(self, reason: str) -> Refused:
        refused = Refused(reason)
        refused.title = self.name
        return refused

    def end(self) -> None:
        self._signal(signal.SIGCONT)
        self.child.kill()
        self.child.wait()


def start(args: argparse.Namespace, shortest: Any, running: dict[str, Process]) -> dict[str, str]:
    """Fill ``running`` with all variants that run; why the others don't."""
    work, threads = args.work, str(args.threads)
    work.mkdir(parents=True, exist_ok=True)
    wanted = [(_title(name), sys.executable, "qpass_peer.py", name, None) for name in args.ours]
    for entry in args.peers or [f"{name}:{variant}" for name, peer in PEERS.items() for variant in peer.variants]:
        name, _, variant = entry.partition(":")
        if name not in PEERS:
            raise SystemExit(f"{name}: accepted are {', '.join(PEERS)}")
        python = str(args.installed / name / "bin" / "python")
        reason = why_not(args.installed, name)
        wanted.append((f"{PEERS[name].title} {_title(variant)}", python, PEERS[name].script, variant, reason))
    absent: dict[str, str] = {}
    for title, python, script, variant, reason in wanted:
        started = time.perf_counter()
        try:
            if reason is not None:
                raise Refused(reason)
            command = [python, str(HERE / script), str(Path(args.model).resolve()), variant, threads, str(work)]
            process = Process(title, command, work)
            running[title] = process
            process.warm_up(shortest, 2)
            print(
                f"{title}: {process.about['version']}, ready in {time.perf_counter() - started:.0f} s", file=sys.stderr
            )
        except Refused as error:
            absent[title] = str(error)
            if title in running:
                running.pop(title).end()
            print(f"{title}: {error}", file=sys.stderr)
    return absent


def measure(args: argparse.Namespace, prompts: dict[int, Any], running: dict[str, Process]) -> Iterator[Record]:
    """Records as they come: first of those that don't run, then prompt by prompt."""
    common = {"model": Path(args.model).name, "threads": args.threads, "run": time.strftime("%Y-%m-%dT%H:%M:%S")}
    for title, reason in start(args, prompts[min(prompts)], running).items():
        yield _absent(title, reason, common)
    for length, ids in prompts.items():
        able = dict(running)
        for title, process in able.copy().items():
            try:
                process.warm_up(ids, args.new)
            except Refused as error:
                print(f"{title}, prompt of {length}: {error}", file=sys.stderr)
                yield _absent(title, str(error), common)
                del able[title]
        while able:
            contenders = [
                Contender(
                    title,
                    process.generate,
                    None,
                    {"version": process.about["version"], "peer": title not in map(_title, args.ours)},
                )
                for title, process in able.items()
            ]
            processes = [os.getpid(), *(process.child.pid for process in able.values())]
            try:
                yield from list(measure_case(contenders, ids, args.new, args.rounds, common, processes))
                break
            except Refused as error:  # in its turn: the others' turns begin anew
                print(f"{error.title}, prompt of {length}: {error}", file=sys.stderr)
                yield _absent(error.title, str(error), common)
                running.pop(error.title).end()
                del able[error.title]
        if not able:
            continue
        name, first = next((title, process.tokens) for title, process in able.items())
        for title, process in able.items():
            pairs = enumerate(zip(first, process.tokens, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), args.new)
            print(f"{title}: the first {same} of {args.new} tokens are those of {name}", file=sys.stderr)


def _title(variant: str) -> str:
    """A variant as its row is called: of a draft's folder, its name."""
    scheme, plus, draft = variant.partition("+")
    return f"{scheme.strip()} + {Path(draft.strip()).name}" if plus else variant


def _absent(title: str, reason: str, common: dict[str, Any]) -> Record:
    return replace(Record.of("absent", [0.0], "", common | {"variant": title, "reason": reason, "peer": True}), n=0)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main() -> None:
    from rich.console import Console
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = _names
    parser.add_argument("model", help="a folder for transformers")
    parser.add_argument("--ours", type=names, default=["stock", "w8a16", "w4a16-g128", "w4a8-g128"], help='"" for none')
    parser.add_argument("--peers", type=names, default=[], help="NAME:VARIANT, ...; by default all")
    parser.add_argument("--prompt-len", type=names, default=["128"])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=detect().cores)
    parser.add_argument("--installed", type=Path, default=folder(), help="where install.py put them")
    parser.add_argument("--work", type=Path, help="converted models and logs; by default beside the peers")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    args.work = args.work or args.installed / "work"
    loaded = Loaded(None, AutoTokenizer.from_pretrained(args.model), args.model)  # type: ignore[arg-type]  ids only
    prompts = {int(length): prompt_ids(loaded, None, int(length), 1) for length in args.prompt_len}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process of ours stays behind
    running: dict[str, Process] = {}
    records: list[Record] = []
    try:
        for record in measure(args, prompts, running):
            records.append(record)
            if args.output:
                append(args.output, [record])
    finally:
        for process in running.values():
            process.end()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for each in table(records):
        console.print(each)


if __name__ == "__main__":
    main()
