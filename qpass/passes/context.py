"""Context: everything a pass may know besides the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpass.cpu import Cpu
from qpass.lowering.given import Given, given_of
from qpass.lowering.store import WeightRef, WeightStore
from qpass.passes.calibrated import Calibrated
from qpass.scheme import Scheme


@dataclass(frozen=True)
class SiteRecord:
    """What became of one linear (or one merged group of them): a row of explain."""

    names: tuple[str, ...]
    name: str
    n: int
    k: int
    scheme: str
    lowering: str  # "inductor" for a linear that was left as it is
    fused: tuple[str, ...] = ()  # epilogue parts in the order they run: bias, silu, glu, mul, residual
    bytes_before: int = 0
    bytes_after: int = 0
    notes: tuple[str, ...] = ()  # refusals, and why a linear was left
    same_rows: int = 0  # up to how many tokens at once a row has the bits that it has alone; 0: no promise
    m: int = 0  # tokens that the times below are for; 0 where nothing was timed
    predicted_ms: float | None = None  # by the performance model
    measured_ms: float | None = None
    dense_ms: float | None = None  # of the same layer as it was


def parameters_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[str, Tensor]:
    """The Parameters among the inputs of Dynamo's graph, by the names of their placeholders."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return {
        node.name: value
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, nn.Parameter)
    }


@dataclass
class Context:
    """``parameters`` maps the graph's placeholder names to the real Parameters behind them."""

    parameters: dict[str, Tensor]
    scheme_of: Callable[[str, bool], Scheme]  # (module name, weight is tied to an embedding) -> Scheme
    cpu: Cpu
    weights: WeightStore
    check_names: Callable[[list[str]], None] = lambda names: (
        None
    )  # raises for a module pattern that matches none of them
    materialize: bool = False  # real codes in the graph, so that it can be run between passes
    lowering: str | None = None  # the only lowering to use, where the user named one
    calibrated: Calibrated | None = None  # what calibration saw, where the user gave it
    insist: bool = False  # quantize even where the layer as it was is faster
    records: list[SiteRecord] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)  # parameter or module name -> why it was left as it is
    quantized: dict[str, Tensor] = field(default_factory=dict)  # weight name -> the Parameter that codes replaced
    progress: Callable[[int, int, str], None] = lambda done, total, name: None

    def weight_ref(self, node: object) -> WeightRef | None:
        """The Parameter behind a weight operand: a placeholder, or ``torch.t`` of one; None for anything computed."""
        transposed = False
        if isinstance(node, fx.Node) and node.op == "call_function" and node.target is torch.t:
            node, transposed = node.args[0], True
        if isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr"):
            parameter = self.parameters.get(node.name)
            if parameter is not None and parameter.dim() == 2:
                return WeightRef(parameter, transposed)
        return None

    def is_tied(self, weight: fx.Node) -> bool:
        """Whether an embedding of this graph reads the same Parameter."""
        source = weight.args[0] if weight.op == "call_function" else weight
        return any(user.op == "call_function" and user.target is torch.nn.functional.embedding for user in source.users)

    def vector(self, node: fx.Node) -> Tensor:
        """The Parameter behind a norm's operand, or the constant that a pass made of one."""
        known = self.parameters.get(node.name)
        found = getattr(node.graph.owning_module, str(node.target)) if known is None else known
        assert isinstance(found, Tensor)
        return found.detach()

    def given_of(self, node: fx.Node) -> Given | None:
        """What was given for the weights of a canonical linear; siblings are merged only where it is alike."""
        ref = self.weight_ref(node.args[1][0])
        return None if ref is None else given_of(ref.parameter)

    def scheme_for(self, node: fx.Node) -> Scheme:
        """The scheme of a canonical linear; merged ones have that of their first.

        Given codes keep their format. They give way to a choice that leaves the layer alone, where its own values are there.
        """
        name, weight = node.meta["qpass_names"][0], node.args[1][0]
        chosen = self.scheme_of(name, self.is_tied(weight))
        given = self.given_of(node)
        if given is None or (not chosen.quantizes and not self.weights.is_released(self.weight_ref(weight).parameter)):
            return chosen
        return given.scheme(chosen)
