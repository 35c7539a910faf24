"""Where the time of one decode step goes: linears by shape, attention, the pointwise kernels, and what is left for Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

from qpass.measure.record import Record

KINDS = {
    "linear": ("qpass::packed_linear", "aten::linear", "aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"),
    "attention": ("qpass::attention", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product"),
    "embedding": ("qpass::packed_embedding", "aten::embedding"),
    "rotary": ("qpass::rope_append",),  # and the cache's writes
    "pointwise": ("graph_", "cpp_fused"),  # Inductor's kernels: whatever of norms, rotary and residuals is left to it
}
REST = "rest"
"""Wrapper, guards, allocations: the step's wall time less everything above."""


@dataclass(frozen=True)
class Part:
    """One kind of work, or one shape of linear: milliseconds of a step and calls in it."""

    name: str
    ms: float
    calls: float
    weight_bytes: int = 0  # read in a step, all calls together; linears only

    def share(self, step_ms: float) -> float:
        return self.ms / step_ms if step_ms else 0.0

    @property
    def read_gbps(self) -> float:
        return self.weight_bytes / self.ms / 1e6 if self.ms else 0.0


@dataclass(frozen=True)
class Profile:
    """``parts`` add up to ``step_ms``, the mean wall time of a step without the profiler (or their sum, if that is more)."""

    step_ms: float
    parts: tuple[Part, ...]
    linears: tuple[Part, ...]  # the linear part by (K, packed bytes)

    def part(self, name: str) -> Part:
        return next((part for part in self.parts if part.name == name), Part(name, 0.0, 0.0))

    def record(self, settings: Mapping[str, Any]) -> Record:
        """The step's time as a Record, its parts and linears in the settings."""
        parts = {"parts": [asdict(part) for part in self.parts], "linears": [asdict(part) for part in self.linears]}
        return Record.of("profile", [self.step_ms], "ms", {**settings, **parts})

    @property
    def outside_linears(self) -> float:
        """The share of the step that is not in linear layers."""
        return 1.0 - self.part("linear").share(self.step_ms)


@contextmanager
def named_kernels() -> Iterator[None]:
    """Have Inductor's C++ kernels report themselves to the profiler; holds for graphs that are compiled inside."""
    from torch._inductor import config

    with config.patch({"cpp.enable_kernel_profile": True}):
        yield


def profile_steps(step: Callable[[int], Any], steps: int = 16, warm_up: int = 4, turns: int = 4) -> Profile:
    """Run ``step(i)`` for i = 0, 1, ...: some alone for their wall time, some under torch's profiler for their parts, in turns.

    The profiler adds microseconds to every op, which would all look like Python's; so the rest is what the wall time
    without it leaves. Runs ``warm_up + 2 * steps`` steps.
    """
    index = 0

    def run(count: int) -> float:
        nonlocal index
        started = time.perf_counter()
        for _ in range(count):
            step(index)
            index += 1
        return 1e3 * (time.perf_counter() - started)

    run(warm_up)
    alone_ms, events = 0.0, []
    for _ in range(turns):
        alone_ms += run(steps // turns)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            run(steps // turns)
        events.extend(profiler.key_averages(group_by_input_shape=True))
    count = steps // turns * turns
    return _sort(events, alone_ms / count, count)


def kind_of(event: str) -> str | None:
    """The kind of work that a profiler event stands for; None for what counts as the rest."""
    return next((kind for kind, prefixes in KINDS.items() if event.startswith(prefixes)), None)


def _sort(events: Sequence[Any], alone_ms: float, steps: int) -> Profile:
    kinds: dict[str, list[float]] = {}
    linears: dict[tuple[int, int], list[float]] = {}
    for event in events:
        kind = kind_of(event.key)
        if kind is None:
            continue
        ms, calls = event.self_cpu_time_total / 1e3 / steps, event.count / steps
        _add(kinds, kind, ms, calls)
        if kind == "linear" and (shape := _linear_shape(event)) is not None:
            _add(linears, shape, ms, calls)
    parts = [Part(kind, ms, calls) for kind, (ms, calls) in kinds.items()]
    known_ms = sum(part.ms for part in parts)
    step_ms = max(alone_ms, known_ms)
    parts.append(Part(REST, step_ms - known_ms, 1.0))
    shapes = [
        Part(f"K = {k}, {size / 1e6:.1f} MB", ms, calls, round(size * calls))
        for (k, size), (ms, calls) in linears.items()
    ]
    return Profile(
        step_ms,
        tuple(sorted(parts, key=lambda part: -part.ms)),
        tuple(sorted(shapes, key=lambda part: -part.ms)),
    )


def _linear_shape(event: Any) -> tuple[int, int] | None:
    """(K, packed bytes) of a quantized linear: from its inputs, or from its name where it is a step of a chain."""
    name, _, shape = event.key.partition(" ")
    if name != "qpass::packed_linear":
        return None
    if shape:
        k, size = shape.strip("[]").split(", ")
        return int(k), int(size)
    x, packed = event.input_shapes[:2]
    return x[-1], packed[0]


def _add(table: dict[Any, list[float]], key: Any, ms: float, calls: float) -> None:
    entry = table.setdefault(key, [0.0, 0.0])
    entry[0] += ms
    entry[1] += calls
