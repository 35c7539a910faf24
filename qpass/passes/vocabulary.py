"""The vocabulary check: which qpass ops, and which spellings, may stand in the graph after which pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from qpass.ops.quantized_linear import bound_arguments
from qpass.passes.activations import activation_of, spells_activation
from qpass.passes.context import Context
from qpass.passes.keep_int8 import codes_wanted
from qpass.passes.linears import is_unspelled
from qpass.passes.names import Names
from qpass.passes.norms import norm_of_call
from qpass.passes.spellings import spells_arithmetic
from qpass.passes.values import VALUE, Writes, tensor_of

LINEAR = torch.ops.qpass.linear.default
QUANTIZED = torch.ops.qpass.quantized_linear.default
_REQUIRED = 8  # arguments of quantized_linear: x, the weight, the bias, the format

ALLOWED: dict[str, frozenset[str]] = {
    "canonicalize": frozenset({"linear", "norm"}),
    "merge_siblings": frozenset({"linear", "norm"}),
    "fold_smoothing": frozenset({"linear", "norm"}),
    "quantize_linears": frozenset({"linear", "norm", "quantized_linear"}),
    "fuse_norms": frozenset({"linear", "norm", "quantized_linear"}),
    "fuse_epilogues": frozenset({"linear", "norm", "quantized_linear"}),
    "keep_int8": frozenset({"linear", "norm", "quantized_linear"}),
    "lower": frozenset({"quantized_linear", "packed_linear"}),
    "share_embeddings": frozenset({"quantized_linear", "packed_linear", "packed_embedding"}),
    "fuse_rope": frozenset({"quantized_linear", "packed_linear", "packed_embedding", "rope_append"}),
    "chain_calls": frozenset({"quantized_linear", "packed_linear", "packed_embedding", "rope_append", "chain"}),
}
"""By pass: the ops of ``torch.ops.qpass`` that may stand behind it. A pass that is not named here is not checked."""

_NORM_ARGUMENTS = frozenset({"norm", "norm_weight", "norm_bias", "norm_eps"})
_INPUT = frozenset({"x_scale", "x_shift", "outliers", "outlier_weight", "rotate"})
_FUSED_SO_FAR: dict[str, frozenset[str]] = {
    "quantize_linears": _INPUT,
    "fuse_norms": _INPUT | _NORM_ARGUMENTS,
    "fuse_epilogues": _INPUT | _NORM_ARGUMENTS | {"activation", "glu", "mul", "residual"},
}
"""What a quantized_linear may say behind a pass, beside its weight: epilogues come with fuse_epilogues, int8 outputs with keep_int8."""


def check(stage: str, graph: fx.Graph, ctx: Context) -> list[str]:
    """What the graph after ``stage`` says in words that it must not use; empty when all is well."""
    allowed = ALLOWED.get(stage)
    if allowed is None:
        return []
    complaints = [
        f"{node.name}: qpass.{name} has no place after {stage}"
        for node in graph.nodes
        if (name := _qpass_op(node)) is not None and name not in allowed
    ]
    complaints += _check_linears(graph)
    if stage == "canonicalize":
        complaints += _check_spellings(graph, ctx)
    if stage in _FUSED_SO_FAR:
        complaints += [
            f"{node.name}: {', '.join(early)} in a quantized_linear after {stage}"
            for node in graph.find_nodes(op="call_function", target=QUANTIZED)
            if (early := sorted(set(_named(node)) - _FUSED_SO_FAR[stage]))
        ]
    if stage == "keep_int8":
        writes = Writes(graph)
        complaints += [
            f"{node.name}: is rounded to the model's dtype, and then to int8"
            for node in graph.find_nodes(op="call_function", target=QUANTIZED)
            if codes_wanted(node) is not None and node.kwargs.get("y_scale") is None and not writes.touch(node)
        ]
    if stage == "lower":
        complaints += _check_lowered(graph)
    return complaints


def _named(node: fx.Node) -> list[str]:
    """The names of the optional arguments that a quantized_linear is given."""
    names = [argument.name for argument in QUANTIZED._schema.arguments]
    return [*names[_REQUIRED : len(node.args)], *node.kwargs]


def _qpass_op(node: fx.Node) -> str | None:
    if (
        node.op != "call_function"
        or not isinstance(node.target, torch._ops.OpOverload)
        or node.target.namespace != "qpass"
    ):
        return None
    return node.target._schema.name.split("::")[1]


def _check_linears(graph: fx.Graph) -> Iterator[str]:
    """Each carries as many names as weights, and its value."""
    for target in (LINEAR, QUANTIZED):
        for node in graph.find_nodes(op="call_function", target=target):
            names = node.meta.get("qpass_names")
            if not names:
                yield f"{node.name}: without the names of its modules"
            elif target is LINEAR and not len(names) == len(node.args[1]) == len(node.args[2]):
                yield f"{node.name}: {len(names)} names, {len(node.args[1])} weights, {len(node.args[2])} biases"
            if tensor_of(node) is None:
                yield f"{node.name}: without a value under meta[{VALUE!r}]"


def _check_spellings(graph: fx.Graph, ctx: Context) -> Iterator[str]:
    names, writes = Names(graph, ctx.parameters), Writes(graph)
    for node in graph.nodes:
        if spells_arithmetic(node) or (spells_activation(node) and activation_of(node) is None):
            yield f"{node.name}: {node.target} has another spelling"
        norm = norm_of_call(node, ctx)
        if norm is not None and not writes.touch(node, norm.x, norm.weight, norm.bias):
            yield f"{node.name}: {node.target} is a norm in another spelling"
        weight = is_unspelled(node, ctx)
        if weight is not None and names.linear(node, weight) not in ctx.left:
            yield f"{node.name}: a linear over {names.parameter(weight)} that is neither qpass.linear nor accounted for"


def _check_lowered(graph: fx.Graph) -> Iterator[str]:
    """The quantized_linear that the reference lowering keeps reads real codes, not stand-ins."""
    module = graph.owning_module
    for node in graph.find_nodes(op="call_function", target=QUANTIZED):
        for part in ("codes", "scales", "zeros"):
            operand = bound_arguments(node)[part]
            tensor = getattr(module, str(operand.target), None) if operand.op == "get_attr" else None
            if tensor is None or tensor.is_meta:
                yield f"{node.name}: was not lowered (its {part} are a stand-in)"
                break
