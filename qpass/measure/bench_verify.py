"""What checking K drafted tokens costs, over one plain step at the same place."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qpass.measure.latency import turns
from qpass.measure.record import Record
from qpass.runtime.decoder import Decoder

WIDTHS = (1, 2, 3, 4, 5, 7, 8, 15)


def measure_verification(
    decoder: Decoder,
    settings: Mapping[str, Any],
    *,
    context: int = 512,
    widths: Sequence[int] = WIDTHS,
    rounds: int = 20,
) -> list[Record]:
    """Records ``verify`` in ms, one for each K and one for the plain step (k = 0), all in turns, everything included.

    ``settings`` go into each record; ``plain_ms`` in it is the plain step's median.
    """
    ids = torch.randint(0, decoder.vocabulary, (1, context), generator=torch.Generator().manual_seed(0))
    cache, pad, at = decoder.allocate(1, context + 32), torch.zeros(1, dtype=torch.int64), torch.tensor([context])
    decoder.prefill(ids, at, cache)

    def timed(width: int) -> float:
        started = time.perf_counter()
        if width == 0:
            decoder.likeliest(ids[:, :1], at, pad, cache, context + 1)
        else:
            decoder.verify(ids[:, : width + 1], at, pad, cache, context + 1 + width)
        return 1e3 * (time.perf_counter() - started)

    runs = {str(width): (lambda width=width: timed(width)) for width in (0, *widths)}
    seen = turns(runs, rounds=rounds, warm_up=4)
    plain = Record.of("verify", seen["0"], "ms").value
    about = {**settings, "context": context, "plain_ms": plain}
    return [Record.of("verify", times, "ms", about | {"k": int(k)}) for k, times in seen.items()]
