"""canonicalize: spell each meaning once, so that every later pattern has one form."""

from __future__ import annotations

from torch import fx

from qpass.passes.activations import spell_call, spell_formula
from qpass.passes.context import Context
from qpass.passes.linears import absorb_bias, note_experts, note_nested, spell_linear, unflatten_rows
from qpass.passes.names import Names
from qpass.passes.norms import spell_norm_call, spell_norm_formulas
from qpass.passes.spellings import Owners, drop_noops, functionalize, spell_arithmetic
from qpass.passes.values import Writes


def canonicalize(graph: fx.Graph, ctx: Context) -> int:
    """Respell linears, activations, norms, additions and products; drop what does nothing. Returns how many nodes changed.

    Every linear over a 2-D Parameter becomes ``qpass.linear``, or its name stands in ``ctx.left`` with the reason.
    """
    count = drop_noops(graph)

    # In-place calls go first: each that goes leaves one value fewer that is off limits to all other rules.
    owners = Owners(graph)
    count += sum(functionalize(node, owners) for node in graph.nodes)
    count += sum(spell_call(node) or spell_arithmetic(node) for node in graph.nodes)

    writes, names = Writes(graph), Names(graph, ctx.parameters)
    count += sum(spell_linear(node, ctx, names, writes) for node in list(graph.nodes))
    note_experts(graph, ctx, names)
    note_nested(graph, ctx)
    count += sum(unflatten_rows(node, writes) for node in list(graph.nodes) if not node._erased)
    count += sum(absorb_bias(node, ctx, writes) for node in list(graph.nodes))

    # Formulas go last and backwards: a formula is recognized by its last node, and the inner nodes of it are erased.
    count += sum(spell_formula(node, writes) for node in reversed(list(graph.nodes)) if not node._erased)
    count += sum(spell_norm_call(node, ctx, writes) for node in graph.nodes)
    count += spell_norm_formulas(graph, ctx, writes)
    return count
