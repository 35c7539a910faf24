"""fold_smoothing: what divides a linear's input, channel by channel (SmoothQuant, AWQ), goes into what computes that input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qpass.errors import SchemeError
from qpass.lowering.given import Given
from qpass.passes.attributes import attach
from qpass.passes.context import Context
from qpass.passes.linears import LINEAR
from qpass.passes.norms import NORM
from qpass.passes.preceding import Rows, rows_before
from qpass.passes.values import VALUE, Writes, tensor_of
from qpass.scheme import Scheme

COLUMNS = "qpass_columns"
"""Under this key a linear's meta has what its weight's columns are multiplied by before it is quantized, fp32 [K]."""

ROWS = "qpass_rows"
"""And its rows, fp32 [N], as its bias: what reads its output is divided by it."""

X_SCALE = "qpass_x_scale"
"""And the static scale of its int8 input."""

_SCHEME, _NOTES = "qpass_scheme", "qpass_notes"


@dataclass(frozen=True)
class _Family:
    """Linears that read ``x``, and what each one's weight wants to be multiplied with in its place: ``x / divisor``."""

    x: fx.Node
    linears: list[fx.Node]
    divisor: Tensor | None


def scheme_of(node: fx.Node, ctx: Context) -> Scheme:
    """The scheme of a linear behind this pass: what was asked for, or what it can bear."""
    decided: Scheme | None = node.meta.get(_SCHEME)
    return ctx.scheme_for(node) if decided is None else decided


def fold_smoothing(graph: fx.Graph, ctx: Context) -> int:
    """Find how each quantized linear's input is smoothed, and fold the division; returns how many inputs are divided.

    Into the norm that computes the input, where all its readers want the same (others keep a norm of their own); into
    the rows of the linear before it, through a gate's product or a ReLU; else x is divided in the graph. A static scheme
    gets its scale here, or gives way to one that the layer can bear.
    """
    writes = Writes(graph)
    count = 0
    for family in list(_families(graph, ctx, writes)):
        if family.divisor is None:
            continue
        inverse = family.divisor.reciprocal()
        if not (_into_norm(graph, family, inverse, ctx) or _into_linear(family, inverse, ctx, writes)):
            _divide(graph, family, inverse)
        for node in family.linears:
            node.meta["qpass_fused"] = ("smoothed", *node.meta.get("qpass_fused", ()))
        count += 1
    return count


def _families(graph: fx.Graph, ctx: Context, writes: Writes) -> Iterator[_Family]:
    by_input: dict[tuple, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        if not ctx.scheme_for(node).quantizes:
            continue
        given = ctx.given_of(node)
        alone = node if writes.touch(node.args[0]) else None  # then each reads it at another time
        by_input.setdefault((node.args[0], alone, None if given is None else given.input_key), []).append(node)
    for (x, _, wants), linears in by_input.items():
        given = None if wants is None else ctx.given_of(linears[0])
        if ctx.calibrated is not None:
            yield _Family(x, linears, _decide(linears, given, ctx))
        else:
            _check_static(linears, ctx)
            yield _Family(x, linears, None if given is None else given.divisor)


def _check_static(linears: list[fx.Node], ctx: Context) -> None:
    for node in linears:
        scheme = ctx.scheme_for(node)
        if scheme.needs_statistics:
            raise SchemeError(
                f"{node.meta['qpass_names'][0]}: scheme {scheme} needs statistics: pass stats=qpass.calibrate(model, batches)"
            )


def _decide(linears: list[fx.Node], given: Given | None, ctx: Context) -> Tensor | None:
    """The divisor of the linears' one input, and in their meta what else calibration says."""
    assert ctx.calibrated is not None
    schemes = [ctx.scheme_for(node) for node in linears]
    names = [name for node in linears for name in node.meta["qpass_names"]]
    spread = [scheme for node, scheme in zip(linears, schemes, strict=True) for _ in node.meta["qpass_names"]]
    if all(scheme.activation == "a16" for scheme in schemes):
        return None if given is None else given.divisor
    decision = ctx.calibrated.decide(
        names,
        spread,
        _reading(linears, ctx),
        divisor=None if given is None else given.divisor,
        # An embedding that is tied to a head reads rows of the head's weight: they stay as they are.
        smoothable=not any(ctx.is_tied(weight) for node in linears for weight in node.args[1]),  # type: ignore[union-attr]
    )
    if decision is None:
        return None if given is None else given.divisor
    decided = iter(decision.schemes)
    for node in linears:
        node.meta[_SCHEME] = [next(decided) for _ in node.meta["qpass_names"]][0]
        node.meta[_NOTES] = decision.notes
        if decision.smoothed.scale is not None:
            node.meta[X_SCALE] = decision.smoothed.scale
        if given is None and decision.smoothed.divisor is not None:
            node.meta[COLUMNS] = decision.smoothed.divisor
    return decision.smoothed.divisor


def _reading(linears: list[fx.Node], ctx: Context) -> Callable[[], list[Tensor]]:
    """The weights [N_i, K] of all linears, as they multiply ``x / divisor`` where they are given."""

    def read() -> list[Tensor]:
        refs = [ctx.weight_ref(weight) for node in linears for weight in node.args[1]]  # type: ignore[union-attr]
        return [ctx.weights.values(ref) for ref in refs if ref is not None]

    return read


def _into_norm(graph: fx.Graph, family: _Family, inverse: Tensor, ctx: Context) -> bool:
    node = family.x
    if node.op != "call_function" or node.target is not NORM:
        return False
    x, norm, weight, bias, eps, *offset = node.args
    with graph.inserting_before(node):
        vectors = []
        for name, vector, added in (("weight", weight, sum(offset)), ("bias", bias, 0)):  # type: ignore[arg-type]
            if vector is None:
                tensor = inverse if name == "weight" else None
            else:
                tensor = (ctx.vector(vector).float() + added) * inverse
            vectors.append(None if tensor is None else attach(graph, f"qpass_smoothed_{name}", tensor.contiguous()))
        smoothed = graph.call_function(NORM, (x, norm, *vectors, eps))
    smoothed.meta = dict(node.meta)
    _read_instead(family, smoothed)
    if not node.users:
        graph.erase_node(node)
    return True


def _into_linear(family: _Family, inverse: Tensor, ctx: Context, writes: Writes) -> bool:
    if set(family.x.users) != set(family.linears) or writes.touch(family.x, *family.linears):
        return False
    found: Rows | None = rows_before(family.x, writes)
    if found is None or found.count != len(inverse) or not scheme_of(found.linear, ctx).quantizes:
        return False
    total = tensor_of(found.linear).shape[-1]  # type: ignore[union-attr]
    rows = found.linear.meta.get(ROWS)
    rows = torch.ones(total) if rows is None else rows.clone()
    rows[found.start : found.start + found.count] *= inverse
    found.linear.meta[ROWS] = rows
    return True


def _divide(graph: fx.Graph, family: _Family, inverse: Tensor) -> None:
    first = min(family.linears)
    with graph.inserting_before(first):
        divided = graph.call_function(divide, (family.x, attach(graph, "qpass_smoothing", inverse)))
    divided.meta = {VALUE: family.x.meta[VALUE]}
    _read_instead(family, divided)


def divide(x: Tensor, inverse: Tensor) -> Tensor:
    """``x [..., K]`` times fp32 ``inverse [K]``, rounded once to x's dtype."""
    return (x.float() * inverse).to(x.dtype)


def _read_instead(family: _Family, node: fx.Node) -> None:
    for linear in family.linears:
        linear.args = (node, *linear.args[1:])
