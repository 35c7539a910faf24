"""quantize_linears: codes in place of weights. The only pass that changes the numbers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from qpass.lowering.store import Scaling, WeightRef
from qpass.passes.attributes import attach
from qpass.passes.context import Context
from qpass.passes.fold_smoothing import COLUMNS, OUTLIERS, ROTATE, ROWS, X_SCALE, X_SHIFT, scheme_of
from qpass.passes.values import VALUE
from qpass.qweight import zero_dtype
from qpass.scheme import Format


def quantize_linears(graph: fx.Graph, ctx: Context) -> int:
    """Turn each ``qpass.linear`` whose scheme quantizes into ``qpass.quantized_linear``; returns how many.

    The codes in the graph are stand-ins that hold shapes only, unless ``ctx.materialize``: the store finds the numbers
    once per weight, when a lowering asks for them.
    """
    linears = list(graph.find_nodes(op="call_function", target=torch.ops.qpass.linear.default))
    ctx.check_names([*(name for node in linears for name in node.meta["qpass_names"]), *ctx.left])
    count = 0
    for node in linears:
        x = node.args[0]
        scheme, given = scheme_of(node, ctx), ctx.given_of(node)
        if scheme.weight is None:
            continue
        refs = _scaled_refs(node, ctx)
        n, k = sum(ref.shape[0] for ref in refs), refs[0].shape[1]
        tensors = _tensors(ctx, refs, scheme.weight, n, k)
        with graph.inserting_before(node):
            if given is not None and given.order is not None:
                x = _in_order(graph, x, given.order)
            attributes = [
                attach(graph, f"qpass_{part}", tensor)
                for part, tensor in zip(("codes", "scales", "zeros"), tensors, strict=True)
            ]
            value = _bias(node, refs, scheme.weight, ctx)
            bias = None if value is None else attach(graph, "qpass_bias", value)
            others = {"x_scale": node.meta[X_SCALE]} if scheme.activation == "a8-static" else {}
            others |= {"x_shift": node.meta[X_SHIFT]} if X_SHIFT in node.meta else {}
            others |= {"rotate": True} if node.meta.get(ROTATE) else {}
            others |= _outliers(graph, node, refs, ctx)
            group = scheme.weight.group or 0
            new = graph.call_function(
                torch.ops.qpass.quantized_linear.default,
                (x, *attributes, bias, scheme.weight.bits, group, scheme.activation),
                others,
            )
        new.meta = dict(node.meta) | {
            "qpass_refs": refs,
            "qpass_scheme": scheme,
            "qpass_fused": (*node.meta.get("qpass_fused", ()), *(("bias",) if bias is not None else ())),
        }
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        count += 1
    return count


def _bias(node: fx.Node, refs: tuple[WeightRef, ...], format: Format, ctx: Context) -> Tensor | None:
    """fp32 [N]: the linears' own, its rows scaled as the weights' are, and what the input's shift gives."""
    biases, rows, shift = node.args[2], node.meta.get(ROWS), node.meta.get(X_SHIFT)
    value: Tensor | None = None
    if any(b is not None for b in biases):  # type: ignore[union-attr]
        parameters = tuple(None if b is None else ctx.parameters[b.name] for b in biases)  # type: ignore[union-attr]
        value = ctx.weights.bias(parameters, tuple(ref.shape[0] for ref in refs))
        value = value if rows is None else value * rows
    if shift is None:
        return value
    shifted = shift * ctx.weights.sums(refs, format)
    return shifted if value is None else value + shifted


def _scaled_refs(node: fx.Node, ctx: Context) -> tuple[WeightRef, ...]:
    """The node's weights, each with its part of what fold_smoothing asks for."""
    refs: list[WeightRef] = []
    columns, rows, rotate = node.meta.get(COLUMNS), node.meta.get(ROWS), bool(node.meta.get(ROTATE))
    start = 0
    for weight in node.args[1]:  # type: ignore[union-attr]
        ref = ctx.weight_ref(weight)
        assert ref is not None
        end = start + ref.shape[0]
        if columns is not None or rows is not None or rotate:
            ref = replace(ref, scaling=Scaling(columns, None if rows is None else rows[start:end], rotate))
        refs.append(ref)
        start = end
    return tuple(refs)


def _outliers(graph: fx.Graph, node: fx.Node, refs: tuple[WeightRef, ...], ctx: Context) -> dict[str, fx.Node]:
    """The inputs that are kept from int8, and their columns of the weights, a row each: [C, N] in the model's dtype."""
    index = node.meta.get(OUTLIERS)
    if index is None:
        return {}
    return {
        "outliers": attach(graph, "qpass_outliers", index),
        "outlier_weight": attach(graph, "qpass_outlier_weight", ctx.weights.columns(refs, index)),
    }


def _in_order(graph: fx.Graph, x: fx.Node, order: Tensor) -> fx.Node:
    """x with its channels in the order of the codes' columns."""
    ordered = graph.call_function(torch.index_select, (x, -1, attach(graph, "qpass_order", order)))
    ordered.meta = {VALUE: x.meta[VALUE]}
    return ordered


def _tensors(ctx: Context, refs: tuple, format: Format, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    if ctx.materialize:
        weight = ctx.weights.qweight(refs, format)
        return weight.codes, weight.scales, weight.zeros
    groups = format.groups_of(k)
    return (
        torch.empty(n, k, dtype=torch.uint8, device="meta"),
        torch.empty(n, groups, device="meta"),
        torch.empty(n, groups, dtype=zero_dtype(format), device="meta"),
    )
