"""The linear layers of a model as the passes see them, without its weights: traced on tensors that have shapes only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from qpass.algorithms.rtn import rtn
from qpass.assignment import Assignment
from qpass.cpu import detect
from qpass.errors import CheckpointError, UnsupportedError, raise_ours
from qpass.frontends.hf import locate
from qpass.lowering.site import Site
from qpass.lowering.store import WeightStore
from qpass.passes import PIPELINE
from qpass.passes.context import Context, parameters_of
from qpass.passes.lower import lower
from qpass.passes.runner import run


def sites_of(source: str, scheme: Any, exclude: Sequence[str] = ()) -> list[Site]:
    """Every quantized linear of the model named ``source``, merged as its graphs have it, in graph order.

    Raises OptionError and SchemeError for what was asked, CheckpointError for a config that can't be read,
    UnsupportedError for a model that can't be traced.
    """
    assignment = Assignment.make(scheme, exclude)
    model = _weightless(source)
    found: list[Site] = []

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        ctx = Context(
            parameters=parameters_of(gm, example_inputs),
            scheme_of=assignment,
            cpu=detect(),
            weights=WeightStore(algorithm=rtn),
            check_names=assignment.check,
        )
        rewritten, _ = run(gm, ctx, [step for step in PIPELINE if step is not lower])
        for node in rewritten.graph.find_nodes(op="call_function", target=torch.ops.qpass.quantized_linear.default):
            refs = node.meta["qpass_refs"]
            found.append(
                Site(
                    node.meta["qpass_names"],
                    sum(ref.shape[0] for ref in refs),
                    refs[0].shape[1],
                    node.meta["qpass_scheme"],
                    torch.bfloat16,
                    bool(node.kwargs.get("glu", False)),
                )
            )
        return gm.forward

    try:
        with torch.no_grad():
            torch.compile(model, backend=collect, dynamic=False)(
                torch.zeros(1, 4, dtype=torch.int64, device="meta"), use_cache=False
            )
    except Exception as error:
        raise_ours(error)
        raise UnsupportedError(f"{source} could not be traced without its weights: {_first_line(error)}") from error
    return found


def _weightless(source: str) -> nn.Module:
    """The model that a config describes, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name, extra = locate(source)
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(name, **extra)
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    except Exception as error:  # a foreign file can make its reader fail in any way
        raise CheckpointError(
            f"{source} has no config of a causal language model that could be read: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
