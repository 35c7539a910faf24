"""The attention op against torch's own, per layer shape: decoding a token, verifying some, reading a prompt.

    pytest benchmarks/bench_attention.py --benchmark-enable -o python_files=bench_*.py

Reported beside the times: GB/s of keys and values for few queries, TFLOPS of visible products for many.
"""

from __future__ import annotations

import pytest
import torch

import qpass.ops  # noqa: F401  registers the op
from qpass.kernels import attention_unit

SHAPES = {"qwen-1.5b": (12, 2, 128), "llama-8b": (32, 8, 128), "smollm2-135m": (9, 3, 64)}  # heads, key heads, width


def causal(queries: int, slots: int) -> torch.Tensor:
    last = torch.arange(slots - queries, slots) + 1
    return torch.stack([torch.zeros_like(last), last], -1).int()[None, None]


@pytest.mark.parametrize("kind", ["qpass", "torch"])
@pytest.mark.parametrize(("queries", "slots"), [(1, 512), (1, 4096), (5, 512), (128, 128), (512, 512), (1024, 1024)])
@pytest.mark.parametrize("model", SHAPES)
def test_attention(benchmark, model: str, queries: int, slots: int, kind: str) -> None:
    heads, shared, width = SHAPES[model]
    attention_unit.ensure()
    q = torch.randn(1, heads, queries, width).bfloat16()
    layers = max(1, 2**26 // (slots * shared * width * 4))  # together out of the cache, as those of a model are
    cache = [[torch.randn(slots, 1, shared, width).bfloat16().permute(1, 2, 0, 3) for _ in "kv"] for _ in range(layers)]
    span, scale = causal(queries, slots), width**-0.5
    slot = torch.arange(slots)
    mask = torch.where(slot < span[..., 1:], 0.0, float("-inf")).bfloat16()
    turn = iter(range(10**9))

    def ours() -> torch.Tensor:
        k, v = cache[next(turn) % layers]
        return torch.ops.qpass.attention(q, k, v, span, scale)

    def theirs() -> torch.Tensor:
        k, v = cache[next(turn) % layers]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=heads != shared)

    benchmark(ours if kind == "qpass" else theirs)
    seconds = benchmark.stats.stats.median if benchmark.stats else float("nan")
    visible = int((span[..., 1] - span[..., 0]).sum())
    benchmark.extra_info["tflops"] = round(4 * heads * visible * width / seconds / 1e12, 3)
    benchmark.extra_info["gbps"] = round(4 * shared * slots * width / seconds / 1e9, 1)
