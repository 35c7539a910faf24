"""RMSNorm and LayerNorm: one spelling, ``qpass.norm``, whatever the model wrote.

Models write their RMSNorm out by hand, each with casts, orders and a weight of its own kind. As with activations, such a
formula is recognized by its values: the nodes between one tensor, Parameters [K] and the result are run in fp64 on a
sample and compared with what the vocabulary names. Casts are left out of it, so they may stand anywhere.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qpass.passes.context import Context
from qpass.passes.values import Writes, argument, erase_if_unused, respell, same_kind, same_sizes, tensor_of

NORM = torch.ops.qpass.norm.default
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # what fp32 arithmetic loses nothing of

_CALLS: dict[Any, str] = {
    F.rms_norm: "rms",
    torch.rms_norm: "rms",
    F.layer_norm: "layer",
    torch.layer_norm: "layer",
}
_MEANS = frozenset({torch.mean, "mean", torch.var, "var"})
_CASTS = frozenset({"to", "type", "type_as", "float", "bfloat16", "half"})
_POINTWISE = frozenset(
    {
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow),
        *(torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.pow, torch.square),
        *(torch.rsqrt, torch.sqrt, torch.reciprocal),
        *("add", "sub", "mul", "div", "neg", "pow", "square", "rsqrt", "sqrt", "reciprocal"),
    }
)
_LARGEST = 16  # nodes; LayerNorm by hand with casts has twelve
_COLUMNS = 8  # of the sample
# So small that every epsilon from 1e-12 up shows: it changes the result by 1e-6 of itself or more.
_MAGNITUDE = 1e-3
_TOLERANCE = 1e-9  # relative, of fp64 sums in another order; a wrong epsilon gives 1e-6


@dataclass(frozen=True)
class Norm:
    """What ``qpass.norm`` is called with: weight and bias are placeholders of Parameters [K]."""

    x: fx.Node
    norm: str
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    offset: float = 0.0

    def spell(self, node: fx.Node) -> None:
        args = (self.x, self.norm, self.weight, self.bias, self.eps)
        respell(node, NORM, (*args, self.offset) if self.offset else args)


def spell_norm_call(node: fx.Node, ctx: Context, writes: Writes) -> bool:
    """Respell ``F.rms_norm``, ``F.layer_norm`` and their like over the last dimension."""
    found = norm_of_call(node, ctx)
    if found is None or writes.touch(node, found.x, found.weight, found.bias):
        return False
    found.spell(node)
    return True


def norm_of_call(node: fx.Node, ctx: Context) -> Norm | None:
    """What a call normalizes, if ``qpass.norm`` can say it."""
    if node.op != "call_function" or node.target not in _CALLS:
        return None
    norm = _CALLS[node.target]
    x, shape = argument(node, 0, "input"), argument(node, 1, "normalized_shape")
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias") if norm == "layer" else None
    eps = argument(node, 4, "eps", 1e-5) if norm == "layer" else argument(node, 3, "eps")
    value = tensor_of(x)
    if value is None or value.dtype not in DTYPES or not same_kind(x, node) or not isinstance(shape, tuple | list):
        return None
    if len(shape) != 1 or not same_sizes(shape, value.shape[-1:]):
        return None
    if any(p is not None and not _is_vector(p, x, ctx) for p in (weight, bias)):
        return None
    if eps is None:
        eps = torch.finfo(torch.float32).eps  # torch's own, for 16-bit inputs too: it normalizes in fp32
    return Norm(x, norm, weight, bias, eps) if isinstance(eps, float | int) else None


def spell_norm_formulas(graph: fx.Graph, ctx: Context, writes: Writes) -> int:
    """Replace each formula around a mean of squares that is a norm by ``qpass.norm``; returns how many."""
    count = 0
    for mean in list(graph.nodes):
        if mean._erased or not _is_mean(mean):
            continue
        for root in reversed(list(_results(mean))):
            found = _match(root, mean, ctx, writes)
            if found is not None:
                norm, inside = found
                norm.spell(root)
                erase_if_unused(*(inside - {root}))
                count += 1
                break
    return count


def _results(mean: fx.Node) -> Iterator[fx.Node]:
    """The nodes that may end the formula: what reads the mean, what alone reads that, and so on."""
    node = mean
    for _ in range(_LARGEST):
        if len(node.users) != 1:
            return
        (node,) = node.users
        if not _is_step(node):
            return
        yield node


def _match(root: fx.Node, mean: fx.Node, ctx: Context, writes: Writes) -> tuple[Norm, set[fx.Node]] | None:
    """The norm that ends in ``root``, and its nodes."""
    value = tensor_of(root)
    if value is None or value.dtype not in DTYPES:
        return None
    inside, reads = {root}, _reads(root)
    while True:
        open_ends = [n for n in reads if not _is_vector(n, root, ctx)]
        if mean in inside and len(open_ends) == 1 and same_kind(open_ends[0], root):
            norm = _recognize(root, inside, open_ends[0], sorted(reads - set(open_ends)))
            if norm is not None:
                return None if writes.touch(*inside, *reads) else (norm, inside)
        grown = [n for n in open_ends if _is_step(n) and set(n.users) <= inside]
        if not grown or len(inside) == _LARGEST:
            return None
        # What is made of a weight first, then the latest: so that x is the last end that is open.
        node = max(grown, key=lambda n: (-_rank(n), n))
        inside.add(node)
        reads = reads - {node} | _reads(node)


def _recognize(root: fx.Node, inside: set[fx.Node], x: fx.Node, vectors: list[fx.Node]) -> Norm | None:
    if len(vectors) > 2:
        return None
    generator = torch.Generator().manual_seed(0)
    shape = (*[2] * (_rank(x) - 1), _COLUMNS)
    values: dict[fx.Node, Tensor] = {x: _MAGNITUDE * torch.randn(shape, generator=generator, dtype=torch.float64)}
    for node in vectors:
        values[node] = torch.randn(_COLUMNS, generator=generator, dtype=torch.float64)
    for node in sorted(inside):
        values[node] = _run(node, values)
    result = values[root]
    if result.shape != shape:
        return None
    for eps in _constants(inside):
        for norm in ("rms", "layer"):
            rows = values[x] - (values[x].mean(-1, keepdim=True) if norm == "layer" else 0)
            rows = rows * (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
            for given in permutations(vectors):
                weight, bias = (*given, None, None)[:2]
                for offset in (0.0, 1.0) if weight is not None else (0.0,):
                    expected = rows if weight is None else rows * (values[weight] + offset)
                    expected = expected if bias is None else expected + values[bias]
                    if torch.allclose(result, expected, rtol=_TOLERANCE, atol=0):
                        return Norm(x, norm, weight, bias, eps, offset)
    return None


def _run(node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
    """The node on sample values; casts change nothing."""
    if node.target in _CASTS:
        return values[node.args[0]]
    args, kwargs = fx.node.map_aggregate(
        (node.args, dict(node.kwargs)), lambda a: values.get(a, a) if isinstance(a, fx.Node) else a
    )
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def _constants(nodes: set[fx.Node]) -> list[float]:
    """The numbers in the formula that may be its epsilon."""
    found = {a for node in nodes for a in (*node.args, *node.kwargs.values()) if isinstance(a, float) and 0 < a < 1}
    return [*sorted(found), 0.0]


def _is_step(node: fx.Node) -> bool:
    """A node that the sample can be run through: pointwise, a cast, or a mean over the last dimension."""
    if node.op not in ("call_function", "call_method") or tensor_of(node) is None:
        return False
    if any(tensor_of(operand) is None for operand in node.all_input_nodes):
        return False
    if node.target in _CASTS:
        return node.op == "call_method" and tensor_of(node).is_floating_point()
    return _is_mean(node) or (node.target in _POINTWISE and not node.kwargs)


def _is_mean(node: fx.Node) -> bool:
    """``mean(x, -1, keepdim=True)``; or ``var`` likewise, whose correction the sample shows."""
    if node.op not in ("call_function", "call_method") or node.target not in _MEANS or "dtype" in node.kwargs:
        return False
    x, dim = tensor_of(argument(node, 0, "input")), argument(node, 1, "dim")
    last = (-1, x.dim() - 1) if x is not None else ()
    result = tensor_of(node)
    keeps = result is not None and x is not None and result.dim() == x.dim()
    return keeps and (dim in last or (isinstance(dim, tuple | list) and len(dim) == 1 and dim[0] in last))


def _is_vector(node: object, x: fx.Node, ctx: Context) -> bool:
    """A Parameter [K] beside x [..., K]."""
    if not isinstance(node, fx.Node) or node.op not in ("placeholder", "get_attr") or node.name not in ctx.parameters:
        return False
    value = tensor_of(x)
    return value is not None and same_sizes(ctx.parameters[node.name].shape, value.shape[-1:])


def _reads(node: fx.Node) -> set[fx.Node]:
    """What the node computes with; ``type_as`` reads its second operand's dtype only."""
    return set(node.all_input_nodes[:1] if node.target in _CASTS else node.all_input_nodes)


def _rank(node: fx.Node) -> int:
    value = tensor_of(node)
    return 0 if value is None else value.dim()
