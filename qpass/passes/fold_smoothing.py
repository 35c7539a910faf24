"""fold_smoothing: what divides a linear's input, channel by channel (SmoothQuant, AWQ), goes into what computes that input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qpass.algorithms.outliers import outlier_columns
from qpass.errors import SchemeError
from qpass.passes.attributes import attach
from qpass.passes.calibrated import Decision, most_static
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

X_SHIFT = "qpass_x_shift"
"""And what is taken off the input first, where its codes lie about something else than zero: an asymmetric quantizer."""

ROTATE = "qpass_rotate"
"""And whether its columns, and its input, are rotated."""

OUTLIERS = "qpass_outliers"
"""And which inputs are kept from int8 and multiplied in 16 bits, int64 in order."""

_SCHEME, _NOTES = "qpass_scheme", "qpass_notes"


@dataclass(frozen=True)
class _Family:
    """Linears that read one ``x``, and want ``x * inverse``, one over the divisor, in its place."""

    linears: list[fx.Node]
    inverse: Tensor | None

    @property
    def x(self) -> fx.Node:
        found = self.linears[0].args[0]
        assert isinstance(found, fx.Node)
        return found


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
    for family in _families(graph, ctx, writes):
        if family.inverse is None:
            continue
        inverse = family.inverse
        if not (_into_norm(graph, family, inverse, ctx) or _into_linear(family, inverse, ctx, writes)):
            _divide(graph, family, inverse)
        for node in family.linears:
            node.meta["qpass_fused"] = ("smoothed", *node.meta.get("qpass_fused", ()))
        count += 1
    return count


def _families(graph: fx.Graph, ctx: Context, writes: Writes) -> list[_Family]:
    by_input: dict[tuple, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        if not ctx.scheme_for(node).quantizes:
            continue
        given = ctx.given_of(node)
        alone = node if writes.touch(node.args[0]) else None  # then each reads it at another time
        by_input.setdefault((node.args[0], alone, None if given is None else given.input_key), []).append(node)
    together = list(by_input.values())
    if ctx.calibrated is None:
        for linears in together:
            _check_static(linears, ctx)
        return [_Family(linears, _own_inverse(linears, ctx)) for linears in together]
    decisions = most_static([_decide(linears, ctx) for linears in together])
    return [_Family(linears, _told(linears, found, ctx)) for linears, found in zip(together, decisions, strict=True)]


def _own_inverse(linears: list[fx.Node], ctx: Context) -> Tensor | None:
    """One over the divisor that codes which are there already want."""
    given = ctx.given_of(linears[0])
    return None if given is None or given.divisor is None else given.divisor.reciprocal()


def _check_static(linears: list[fx.Node], ctx: Context) -> None:
    for node in linears:
        scheme = ctx.scheme_for(node)
        if scheme.needs_statistics:
            raise SchemeError(
                f"{node.meta['qpass_names'][0]}: scheme {scheme} needs statistics: pass stats=qpass.calibrate(model, batches)"
            )


def _decide(linears: list[fx.Node], ctx: Context) -> Decision | None:
    """What calibration says of linears that read one input; None where they have no use for it."""
    assert ctx.calibrated is not None
    given = ctx.given_of(linears[0])
    schemes = [ctx.scheme_for(node) for node in linears]
    names = [name for node in linears for name in node.meta["qpass_names"]]
    spread = [scheme for node, scheme in zip(linears, schemes, strict=True) for _ in node.meta["qpass_names"]]
    if all(scheme.activation == "a16" for scheme in schemes) or any(scheme.outliers for scheme in schemes):
        return None
    return ctx.calibrated.decide(
        names,
        spread,
        _reading(linears, ctx),
        divisor=None if given is None else given.divisor,
        # An embedding that is tied to a head reads rows of the head's weight: they stay as they are.
        smoothable=not any(ctx.is_tied(weight) for node in linears for weight in node.args[1]),  # type: ignore[union-attr]
    )


def _told(linears: list[fx.Node], decision: Decision | None, ctx: Context) -> Tensor | None:
    """What the linears' one input is multiplied by, and in their meta what else was decided."""
    schemes = [ctx.scheme_for(node) for node in linears]
    if any(scheme.outliers for scheme in schemes):
        _keep_apart(linears, schemes, ctx)
        return None
    own = _own_inverse(linears, ctx)
    if decision is None:
        return own
    at = 0
    for node in linears:
        node.meta[_SCHEME] = decision.schemes[at]
        at += len(node.meta["qpass_names"])
        node.meta[_NOTES] = decision.notes
        if decision.smoothed.scale is not None:
            node.meta[X_SCALE] = decision.smoothed.scale
        if decision.smoothed.shift and decision.schemes[at - 1].activation == "a8-static":
            node.meta[X_SHIFT] = decision.smoothed.shift
            node.meta["qpass_fused"] = ("shifted", *node.meta.get("qpass_fused", ()))
        if ctx.given_of(node) is None and decision.smoothed.divisor is not None:
            node.meta[COLUMNS] = decision.smoothed.divisor
        if decision.smoothed.rotate:
            node.meta[ROTATE] = True
            node.meta["qpass_fused"] = ("rotated", *node.meta.get("qpass_fused", ()))
    return own if decision.smoothed.divisor is None else decision.smoothed.divisor.reciprocal()


def _keep_apart(linears: list[fx.Node], schemes: list[Scheme], ctx: Context) -> None:
    """Say in the linears' meta which of their inputs stand out; their columns are zeros in what is quantized."""
    assert ctx.calibrated is not None
    name = linears[0].meta["qpass_names"][0]
    absmax = ctx.calibrated.seen(name, next(scheme for scheme in schemes if scheme.outliers)).absmax
    outliers = outlier_columns(absmax)
    if outliers is None:
        return
    mask = torch.ones_like(absmax).index_fill_(0, outliers, 0.0)
    for node, scheme in zip(linears, schemes, strict=True):
        if scheme.outliers:
            node.meta[OUTLIERS], node.meta[COLUMNS] = outliers, mask  # one of each: what is stored goes by their values
            node.meta["qpass_fused"] = ("outliers", *node.meta.get("qpass_fused", ()))


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
