"""A linear layer over given codes outside of any graph: the kernels that graphs have, called alone."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, fx

from qpass.cpu import detect
from qpass.errors import ReleasedWeightError
from qpass.lowering import Site, choose
from qpass.lowering.given import Given, given_of
from qpass.lowering.released import ReleasedParameter
from qpass.lowering.store import WeightRef
from qpass.passes.attributes import attach, detach_unused
from qpass.qweight import zero_dtype
from qpass.scheme import Scheme

_calls: dict[tuple[int, torch.dtype, bool], tuple[Given, Callable[..., Tensor]]] = {}


def eager_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(x, weight, bias)`` by the codes that were given for ``weight`` [N, K]; packed at the first call.

    Without autograd. Raises ReleasedWeightError for a weight whose codes were taken back.
    """
    given = given_of(weight)
    if given is None or not isinstance(weight, ReleasedParameter):
        raise ReleasedWeightError("this weight has neither values nor codes")
    key = (id(weight), x.dtype, bias is None)
    made = _calls.get(key)
    if made is None or made[0] is not given:
        if made is None:
            weakref.finalize(weight, _calls.pop, key, None)
        made = _calls[key] = (given, _make(weight, given, x.dtype, bias is not None))
    with torch.no_grad():
        return made[1](x) if bias is None else made[1](x, bias.float())


def _make(weight: ReleasedParameter, given: Given, dtype: torch.dtype, biased: bool) -> Callable[..., Tensor]:
    """One quantized_linear in a graph of its own, lowered as the pass ``lower`` does it."""
    from qpass.frontends.backend import STORE  # with it comes Inductor, which merely loading a model doesn't need

    (n, k), format = weight.shape, given.format
    scheme = given.scheme(Scheme.parse("w16a16"))
    lowering, _ = choose(Site((weight.qpass_name.removesuffix(".weight"),), n, k, scheme, dtype), detect())
    packed = STORE.packed((WeightRef(weight),), format, lowering)
    graph = fx.Graph()
    gm = fx.GraphModule({}, graph)
    graph = gm.graph
    x, bias = graph.placeholder("x"), graph.placeholder("bias") if biased else None
    if given.divisor is not None:
        x = graph.call_function(operator.truediv, (x, attach(graph, "qpass_divisor", given.divisor.to(dtype))))
    if given.order is not None:
        x = graph.call_function(torch.index_select, (x, -1, attach(graph, "qpass_order", given.order)))
    groups = (n, format.groups_of(k))
    stands_in = (((n, k), torch.uint8), (groups, torch.float32), (groups, zero_dtype(format)))
    codes = [attach(graph, "qpass_codes", torch.empty(shape, dtype=kind, device="meta")) for shape, kind in stands_in]
    arguments = (x, *codes, bias, format.bits, format.group or 0, scheme.activation)
    node = graph.call_function(torch.ops.qpass.quantized_linear.default, arguments)
    with graph.inserting_before(node):
        attributes = tuple(attach(graph, "qpass_packed", tensor) for tensor in packed)
    node.meta["qpass_scheme"] = scheme
    graph.output(lowering.emit(graph, node, attributes))
    graph.erase_node(node)
    detach_unused(graph)
    gm.recompile()
    return gm
