"""fold_smoothing: inputs that meet their weights divided, channel by channel (SmoothQuant, AWQ), are divided."""

from __future__ import annotations

import torch
from torch import fx

from qpass.passes.attributes import attach
from qpass.passes.context import Context
from qpass.passes.linears import LINEAR
from qpass.passes.values import VALUE


def fold_smoothing(graph: fx.Graph, ctx: Context) -> int:
    """Divide the input of each ``qpass.linear`` whose codes want it; returns how many."""
    count = 0
    for node in list(graph.find_nodes(op="call_function", target=LINEAR)):
        given = ctx.given_of(node)
        if given is None or given.divisor is None:
            continue
        x = node.args[0]
        with graph.inserting_before(node):
            inverse = attach(graph, "qpass_smoothing", given.divisor.reciprocal().to(x.meta[VALUE].dtype))
            divided = graph.call_function(torch.mul, (x, inverse))
        divided.meta = {VALUE: x.meta[VALUE]}
        node.args = (divided, *node.args[1:])
        count += 1
    return count
