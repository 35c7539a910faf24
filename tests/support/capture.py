"""The graph that Dynamo hands a backend, and a Context to run passes on it, without Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qpass.algorithms.rtn import rtn
from qpass.cpu import detect
from qpass.lowering.released import released_name
from qpass.lowering.store import WeightStore
from qpass.passes import Context, Pass
from qpass.passes.runner import run
from qpass.scheme import Scheme


@dataclass
class Capture:
    """One captured graph, with the values that Dynamo would call it with."""

    gm: fx.GraphModule
    inputs: list[Any]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        return {
            node.name: value
            for node, value in zip(placeholders, self.inputs, strict=True)
            if isinstance(value, nn.Parameter)
        }

    def run(self, gm: fx.GraphModule | None = None) -> tuple[Any, ...]:
        """Run a graph, the captured one unless told otherwise, on clones of the inputs: they may be written to."""
        inputs = [v.clone() if type(v) is torch.Tensor else v for v in self.inputs]
        with torch.no_grad():
            return (gm or self.gm)(*inputs)


def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Capture:
    """What Dynamo makes of one call; the call must give one graph."""
    captured: list[Capture] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured.append(Capture(gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*args, **kwargs)
    (only,) = captured
    return only


def context(capture: Capture, scheme: str | Callable[[str, bool], Scheme] = "w8a16", **options: Any) -> Context:
    """A Context whose codes are real, so that the graph runs between passes; ``scheme`` holds for all linears, or by name."""
    one = Scheme.parse(scheme) if isinstance(scheme, str) else None
    return Context(
        parameters=dict(capture.parameters),
        scheme_of=(lambda name, tied: one) if one is not None else scheme,
        cpu=detect(),
        weights=WeightStore(algorithm=rtn, is_released=released_name),
        **({"materialize": True} | options),
    )


class Body(nn.Module):
    """A module made of parameters by name and one function ``body(module, *inputs)``: a test's graph in a line or two."""

    def __init__(self, body: Callable[..., Any], **parameters: Any) -> None:
        super().__init__()
        self.body = body
        for name, value in parameters.items():
            setattr(self, name, value)

    def forward(self, *inputs: Any) -> Any:
        return self.body(self, *inputs)


@dataclass
class Rewritten:
    """What a part of the pipeline made of a capture."""

    capture: Capture
    gm: fx.GraphModule
    counts: dict[str, int]
    ctx: Context

    def nodes(self, target: Any) -> list[fx.Node]:
        return [node for node in self.gm.graph.nodes if node.target is target or node.target == target]

    def outputs(self) -> tuple[Any, ...]:
        return self.capture.run(self.gm)


def rewrite(
    function: Callable[..., Any], inputs: tuple[Any, ...], steps: Sequence[Pass], scheme: Any = "w8a16", **options: Any
) -> Rewritten:
    """Capture one call and run some passes on it, with the runner's checks after each."""
    captured = capture(function, *inputs)
    ctx = context(captured, scheme, **options)
    gm, counts = run(captured.gm, ctx, steps)
    return Rewritten(captured, gm, counts, ctx)
