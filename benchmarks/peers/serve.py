"""The one interface of all peers: requests and answers as JSON lines, the same clock, the same definitions. Needs nothing but Python.

in    {"prompt": [ids], "new": N}
out   {"ready": {...}} once, then for each request {"tokens": [N ids], "times": [N seconds since the request]}
      or {"error": "a sentence"}

Whatever an engine prints goes to stderr. TTFT is times[0]; TPOT is (times[-1] - times[0]) / (N - 1).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # an engine's own words must not stand between the answers

Generate = Callable[[list[int], int, Callable[[int], Any]], None]
"""``generate(prompt, new, on_token)`` calls ``on_token`` with each new token's id as soon as it is known, no end token stops it."""


def arguments() -> tuple[str, str, int, str]:
    """The model's folder, the variant, the number of threads, and a folder for converted models."""
    folder, variant, threads, work = sys.argv[1:5]
    return folder, variant, int(threads), work


def serve(generate: Generate, **about: Any) -> None:
    """Answer requests until stdin ends."""
    _say({"ready": about})
    for line in sys.stdin:
        request = json.loads(line)
        tokens: list[int] = []
        times: list[float] = []
        started = time.perf_counter()

        def on_token(
            token: int, tokens: list[int] = tokens, times: list[float] = times, started: float = started
        ) -> None:
            times.append(time.perf_counter() - started)
            tokens.append(int(token))

        try:
            generate(request["prompt"], request["new"], on_token)
        except Exception as error:  # the other side prints it as this peer's row
            _say({"error": f"{type(error).__name__}: {error}"})
            continue
        _say({"tokens": tokens, "times": times})


def _say(message: dict[str, Any]) -> None:
    _answers.write(json.dumps(message) + "\n")
    _answers.flush()
