"""One linear layer as pytest-benchmark cases: our kernels, and what torch ships; weights streamed from memory.

    pytest benchmarks/bench_linear.py --benchmark-enable --benchmark-json=linear.json

``extra_info`` has the weight's bytes, the shares of the machine's limits and the model's prediction. A case walks
through copies of its weight that leave every cache behind; a round is one pass through them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qpass.cpu import detect
from qpass.kernels.load import tuning_of
from qpass.kernels.plan import SERVED, Shape, predict
from qpass.kernels.rates import measured_cpu
from qpass.measure.linear import PEERS, candidate, format_of
from qpass.scheme import Scheme

SHAPES = ((8960, 1536), (1536, 8960))  # N, K: up and down of a 1.5B model
TOKENS = (1, 5, 16, 128, 512)
SCHEMES = ("w4a16-g128", "w4a8-g128", "w4a8-g128-intscale", "w8a16", "w8a8-dynamic", "w3a8-g64", "w2a8-g64")


@pytest.mark.skipif(detect().tier not in SERVED, reason="the generated kernels need AVX2")
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[1]}to{s[0]}")
@pytest.mark.parametrize("name", [*SCHEMES, *PEERS])
def test_linear(benchmark: Any, name: str, shape: tuple[int, int], m: int) -> None:
    if m > 16 and name in ("int4pack-g128", "int8pack"):
        pytest.skip("ATen's weight-only kernels are written for few tokens: seconds a case here")
    (n, k), cpu = shape, measured_cpu()
    assert cpu.rates is not None
    x = torch.randn(m, k).to(torch.bfloat16)
    with torch.no_grad():
        case = candidate(name, n, k)
        case.seconds(x)
        times: list[float] = []
        benchmark.pedantic(lambda: times.append(case.seconds(x)), rounds=5)
    best = min(times)
    info = benchmark.extra_info
    info["weight_bytes"], info["ms"] = case.weight_bytes, 1e3 * best
    info["share_of_bandwidth"] = case.weight_bytes / best / cpu.rates.read_bytes
    if name in SCHEMES:
        format = format_of(Scheme.parse(name))
        planned = predict(Shape(m, n, k), format, cpu, tuning_of(format).path(format, cpu.tier, m))
        info["path"], info["predicted_ms"] = planned.path, 1e3 * planned.seconds
        info["share_of_limit"] = planned.limit_seconds / best
