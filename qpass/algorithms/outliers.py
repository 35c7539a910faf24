"""LLM.int8 (arXiv 2208.07339): the few inputs that are far larger than the rest are multiplied in 16 bits, apart.

The paper's threshold is an absolute magnitude of 6, found at 6.7B parameters. Here it is relative: what matters to int8 is how
far a channel stands out of the row that it shares a scale with.
"""

from __future__ import annotations

from torch import Tensor

THRESHOLD = 6.0
"""Times the median channel's largest magnitude."""

MOST = 1 / 16
"""Of all inputs; where more stand out it is no longer a few."""


def outlier_columns(absmax: Tensor, threshold: float = THRESHOLD) -> Tensor | None:
    """The inputs whose largest magnitude ``absmax [K]`` is above ``threshold`` times the median one; int64, in order.

    At most :data:`MOST` of all, the largest; None where none stands out.
    """
    median = float(absmax.median())
    above = absmax > threshold * median
    most = max(1, int(absmax.numel() * MOST))
    count = min(int(above.sum()), most)
    if not count:
        return None
    return absmax.topk(count).indices.sort().values
