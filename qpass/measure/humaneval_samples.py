"""Answers to HumanEval's prompts: generated in batches, kept in a file of JSON lines as they come, never made twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qpass.errors import OptionError
from qpass.measure.humaneval import Problem, Question, completion, cut
from qpass.runtime.speculate import Speculator

_TAIL = 4
"""Tokens around a stop sequence that just ended: what decodes apart may not be what decodes together."""


@dataclass(frozen=True)
class Sample:
    """One answer. ``about`` is what it depends on (model, scheme, prompts, lengths, stops): another's answers are not reused."""

    task_id: str
    completion: str  # what stands behind the prompt in the program
    answer: str  # what the model wrote, up to its stop
    tokens: int
    finished: bool  # False: cut at the most tokens
    about: Mapping[str, Any]


def read(path: Path, about: Mapping[str, Any]) -> dict[str, Sample]:
    """The samples of a file that were made so, by task id. A last line that was interrupted is passed over."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            sample = Sample(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if sample.about == about:
            found[sample.task_id] = sample
    return found


def append(path: Path, samples: Sequence[Sample]) -> None:
    """Add one JSON line a sample; a line that was interrupted is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write("".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples).encode())
        file.flush()
        os.fsync(file.fileno())


def generate(
    speculator: Speculator,
    tokenizer: Any,
    chosen: Mapping[str, Problem],
    path: Path,
    *,
    about: Mapping[str, Any],
    chat: bool = False,
    batch: int = 8,
    max_new_tokens: int = 512,
    on_done: Callable[[int, int], None] | None = None,
) -> dict[str, Sample]:
    """Greedy samples of all ``chosen`` problems, those in ``path`` from there and the others added to it a batch at a
    time. Problems of like length share a batch, and the last one is filled up: one batch size, few graphs."""
    if batch < 1:
        raise OptionError(f"batch is {batch}; accepted: 1 or more")
    questions = {name: Question.of(problem, tokenizer, chat) for name, problem in chosen.items()}
    stops = sorted({stop for question in questions.values() for stop in question.stops})
    about = json.loads(json.dumps({**about, "stops": stops}))
    found = {name: sample for name, sample in read(path, about).items() if name in chosen}
    ids = {
        name: tokenizer(question.text, add_special_tokens=question.special).input_ids
        for name, question in questions.items()
        if name not in found
    }
    names = sorted(ids, key=lambda name: (-len(ids[name]), name))  # the longest first: what doesn't fit is told at once
    for at in range(0, len(names), batch):
        mine = names[at : at + batch]
        rows = [ids[name] for name in mine]
        answers = _answers(speculator, tokenizer, rows, questions[mine[0]].stops, batch, max_new_tokens)
        for name, (new, ended) in zip(mine, answers, strict=True):
            text = _text(tokenizer, new)
            answer = cut(text, questions[name].stops)
            behind = completion(chosen[name], answer, chat)
            found[name] = Sample(name, behind, answer, len(new), ended or answer != text, about)
        append(path, [found[name] for name in mine])
        if on_done is not None:
            on_done(len(found), len(chosen))
    return {name: found[name] for name in chosen}


def _answers(
    speculator: Speculator, tokenizer: Any, rows: list[list[int]], stops: Sequence[str], batch: int, most: int
) -> list[tuple[list[int], bool]]:
    """Each row's new tokens without the end token, and whether there was one: any that the model or its tokenizer
    calls an end."""
    decoder = speculator.decoder
    ends = {*decoder.eos(), tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    longest = max(map(len, rows))
    if decoder.context is not None:
        most = min(most, decoder.context - longest)
    out = speculator.generate(
        *_left_padded(rows + [rows[-1]] * (batch - len(rows)), longest),
        max_new_tokens=most,
        eos_token_id=sorted(ends),
        stop=stop_at(tokenizer, rows, stops),
    )
    return [(new[:-1], True) if new and new[-1] in ends else (new, False) for new in out.new_tokens[: len(rows)]]


def _left_padded(rows: list[list[int]], longest: int) -> tuple[Tensor, Tensor]:
    """ids and mask, int64 [B, longest]."""
    ids = torch.stack([pad(torch.tensor(row), (longest - len(row), 0)) for row in rows])
    mask = torch.stack([pad(torch.ones(len(row), dtype=torch.int64), (longest - len(row), 0)) for row in rows])
    return ids, mask


def stop_at(tokenizer: Any, prompts: list[list[int]], stops: Sequence[str]) -> Callable[[Sequence[int]], bool]:
    """Whether a row's new text holds a stop sequence; the prompt's own text does not count."""
    tokens = _TAIL + max((len(each.encode()) for each in stops), default=0)  # a token spells at least a byte

    def stop(row: Sequence[int]) -> bool:
        begins = max(len(prompt) for prompt in prompts if list(row[: len(prompt)]) == prompt)
        tail = _text(tokenizer, row[max(begins, len(row) - tokens) :])
        return any(each in tail for each in stops)

    return stop


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))
