"""Never slower than bf16: a site's lowering and the layer that it replaces, timed on the site's own weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qpass.cpu import Cpu
from qpass.errors import KernelError
from qpass.lowering import Lowering
from qpass.lowering.generated import Generated
from qpass.lowering.site import Site
from qpass.lowering.store import WeightRef
from qpass.qweight import zero_dtype

SMALLEST = 1 << 20
"""Weights with fewer elements are not timed: what could be lost is less than the clock can tell."""

LOSES = 1.10
"""A quantized site is given up when it takes a tenth longer than bf16: less is what two runs of one code differ by."""

PROMPT = 128
"""Tokens of a graph whose number of tokens varies: where it matters most, a prompt's."""

FEW = 64
"""A number of tokens that varies up to this many is a verification's, which must run what the token step runs: 1 a row."""

DISTURBED = 3.0
"""Times the model's prediction, which is within a quarter on a quiet machine."""

_ROUNDS = 5
_TRIES = 3
_ENOUGH_S = 0.1  # of one candidate, for wide calls


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call with M tokens, weights from memory; ``dense_ms`` None where the original is gone."""

    m: int
    ms: float
    dense_ms: float | None
    predicted_ms: float | None = None  # by the performance model, for the generated kernels

    @property
    def disturbed(self) -> bool:
        """Far behind what the model says: something else was running, and the clock says nothing about the kernel."""
        return self.predicted_ms is not None and self.ms > DISTURBED * self.predicted_ms

    @property
    def loses(self) -> bool:
        return self.dense_ms is not None and not self.disturbed and self.ms > LOSES * self.dense_ms

    def __str__(self) -> str:
        times = f"M = {self.m}: {self.ms:.2f} ms"
        return times if self.dense_ms is None else f"{times}, unquantized {self.dense_ms:.2f} ms"


_timings: dict[tuple, Timing] = {}  # sites alike are timed once a process


def tokens_of(x: object) -> int:
    """M of a site whose input has the (fake) value ``x``: its leading dimensions' product; see PROMPT and FEW if one varies."""
    if not isinstance(x, Tensor):
        return PROMPT
    tokens = 1
    for size in x.shape[:-1]:
        if not isinstance(size, torch.SymInt):
            tokens *= size
        elif size.node.shape_env.bound_sympy(size.node.expr).upper > FEW:
            return PROMPT
    return max(1, tokens)


def time_site(
    site: Site, m: int, lowering: Lowering, packed: tuple[Tensor, ...], refs: tuple[WeightRef, ...] | None, cpu: Cpu
) -> Timing | None:
    """Time ``lowering`` for M tokens against ``F.linear`` over ``refs`` (None: released). None for a site too small to time."""
    if site.n * site.k < SMALLEST:
        return None
    key = (lowering.name, site.scheme, site.n, site.k, site.glu, site.dtype, m, refs is None, torch.get_num_threads())
    if key not in _timings:
        calls: list[Callable[[Tensor], object]] = [_program(site, lowering, packed)]
        if refs is not None:
            weights = [ref.read() for ref in refs]
            calls.append(lambda x: [torch.nn.functional.linear(x, weight) for weight in weights])
        x = torch.randn(m, site.k, generator=torch.Generator().manual_seed(0)).to(site.dtype)
        predicted = _predicted_ms(site, m, lowering, packed, cpu)
        for _ in range(_TRIES):
            quantized, *dense = _interleaved(calls, x, cpu)
            _timings[key] = Timing(m, quantized, dense[0] if dense else None, predicted)
            if not _timings[key].disturbed:
                break
    return _timings[key]


def _predicted_ms(site: Site, m: int, lowering: Lowering, packed: tuple[Tensor, ...], cpu: Cpu) -> float | None:
    """The performance model's word; None for kernels that aren't ours, and where the machine's rates can't be measured."""
    if not isinstance(lowering, Generated):
        return None
    try:
        return lowering.predict_ms(site, m, packed, cpu)
    except KernelError:  # the clock alone decides then
        return None


def _program(site: Site, lowering: Lowering, packed: tuple[Tensor, ...]) -> fx.GraphModule:
    """The site alone, without prologue and epilogue, as a module from x to y."""
    weight = site.scheme.weight
    assert weight is not None
    groups = weight.groups_of(site.k)
    root = torch.nn.Module()
    stand_ins = {
        "codes": torch.empty(site.n, site.k, dtype=torch.uint8, device="meta"),
        "scales": torch.empty(site.n, groups, device="meta"),
        "zeros": torch.empty(site.n, groups, dtype=zero_dtype(weight), device="meta"),
    }
    for name, tensor in (*stand_ins.items(), *((f"packed{i}", t) for i, t in enumerate(packed))):
        root.register_buffer(name, tensor)
    graph = fx.Graph(root)
    x = graph.placeholder("x")
    operands = [graph.get_attr(name) for name in stand_ins]
    attributes = tuple(graph.get_attr(f"packed{i}") for i in range(len(packed)))
    node = graph.call_function(
        torch.ops.qpass.quantized_linear.default,
        (x, *operands, None, weight.bits, weight.group or 0, site.scheme.activation),
        {"glu": site.glu} | ({"x_scale": 1.0} if site.scheme.activation == "a8-static" else {}),
    )
    node.meta["qpass_scheme"] = site.scheme
    emitted = lowering.emit(graph, node, attributes)
    graph.output(emitted)
    node.replace_all_uses_with(emitted)
    graph.erase_node(node)
    return fx.GraphModule(root, graph)


def _interleaved(calls: list[Callable[[Tensor], object]], x: Tensor, cpu: Cpu) -> list[float]:
    """The least milliseconds of each, taking turns; caches are flushed in between, as a whole step would."""
    flush = torch.ones(min(2 * cpu.l3_bytes, 256 << 20) // 8, dtype=torch.int64)
    times: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for call in calls:
            call(x[:1])
        for _ in range(_ROUNDS):
            for call, seen in zip(calls, times, strict=True):
                if sum(seen) > _ENOUGH_S:
                    continue
                flush.sum()
                started = time.perf_counter()
                call(x)
                seen.append(time.perf_counter() - started)
    return [1e3 * (min(seen) if len(seen) > 1 else statistics.median(seen)) for seen in times]
