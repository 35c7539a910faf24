"""How fast this machine reads its memory: the limit that decoding is measured against."""

from __future__ import annotations

import time

import torch


def measure_bandwidth_gbps(megabytes: int = 512, repeats: int = 5) -> float:
    """Read bandwidth of the memory with all of torch's threads, GB/s: the best of ``repeats`` sums over a large tensor."""
    data = torch.ones(megabytes << 17, dtype=torch.int64)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * 8 / best / 1e9
