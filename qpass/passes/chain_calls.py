"""chain_calls: native calls that stand one behind the other become one call."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qpass.ops.chain import FLATTEN, OPS, SLOTS, Slot, line
from qpass.passes.context import Context
from qpass.passes.fuse_rope import ROPE, TO_HEADS
from qpass.passes.values import VALUE, tensor_of

NAMES = {target: name for name, op in OPS.items() for target in (op, op.overloadpacket)}
"""An op that the model's own code calls stands in the graph without its overload."""

CHAIN = torch.ops.qpass.chain.default
WRITING = {1: torch.ops.qpass.chain.one, 2: torch.ops.qpass.chain.two}
"""By the number of their results: chains that write to caches."""


def chain_calls(graph: fx.Graph, ctx: Context) -> int:
    """Turn every run of two native calls or more into one ``qpass.chain``; returns how many runs.

    A run ends at the first node that computes anything else, so nothing changes its order. Heads put side by side
    between attention and the linear behind it belong to the run, and a cache as attention reads it, as weights do.
    """
    runs: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if node.target in NAMES or _flattens(node, runs[-1]) or _is_cache(node):
            runs[-1].append(node)
        elif runs[-1]:
            runs.append([])
    return sum(_join(graph, run) for run in runs)


def _flattens(node: fx.Node, run: list[fx.Node]) -> bool:
    """A view of a member that makes its last two dimensions one, or a copy of such a view that copies nothing."""
    if node.op != "call_method" or node.target not in ("reshape", "view", "flatten", "contiguous"):
        return False
    source, value = node.args[0], tensor_of(node)
    before = tensor_of(source)
    if source not in run or value is None or before is None:
        return False
    if node.target == "contiguous":
        return value.is_contiguous() and before.is_contiguous()
    if value.dim() != before.dim() - 1 or not before.is_contiguous():
        return False
    sizes = (*before.shape[:-2], before.shape[-2] * before.shape[-1])
    return all(statically_known_true(a == b) for a, b in zip(value.shape, sizes, strict=True))


def _is_cache(node: fx.Node) -> bool:
    """A cache that the graph is given, as attention reads it."""
    return (
        node.op == "call_method"
        and node.target == "permute"
        and node.args[1:] == TO_HEADS
        and node.args[0].op == "placeholder"
    )


def _join(graph: fx.Graph, run: list[fx.Node]) -> bool:
    while run and (run[-1].target not in NAMES):  # a view that the run doesn't read stays where it is
        run = run[:-1]
    members = set(run)
    views = [node for node in run if node.target not in NAMES]
    if len(run) - len(views) < 2 or any(user not in members for view in views for user in view.users):
        return False
    results = [node for node in run if any(user not in members for user in node.users)]
    caches = dict.fromkeys(cache for node in run if node.target is ROPE for cache in node.args[4:])
    if caches and len(results) not in WRITING:
        return False
    given: dict[fx.Node, None] = {}
    for node in run:
        sources = node.all_input_nodes if node.target in NAMES else node.args[:1]  # a view's other operands are sizes
        given |= dict.fromkeys(source for source in sources if source not in members and source not in caches)
    inputs = [*given, *caches]
    slots: dict[Any, Slot] = {node: Slot(index) for index, node in enumerate(inputs)}
    steps = [f"inputs {len(inputs)}"]
    for node in run:
        if node.target == "contiguous":
            slots[node] = slots[node.args[0]]
            continue
        name, arguments = (NAMES[node.target], _bound(node)) if node.target in NAMES else (_view(node), [node.args[0]])
        steps.append(line(name, [slots.get(a, a) if isinstance(a, fx.Node) else a for a in arguments]))
        slots[node] = Slot(len(inputs) + len(steps) - 2)
    steps.append(" ".join(("return", *(f"%{int(slots[node])}" for node in results))))
    target, arguments = (WRITING[len(results)], [list(given), list(caches)]) if caches else (CHAIN, [inputs])
    with graph.inserting_after(run[-1]):
        chain = graph.call_function(target, (*arguments, "\n".join(steps)))
    chain.meta[VALUE] = tuple(node.meta[VALUE] for node in results)
    after = chain
    for index, node in enumerate(results):
        if target is not WRITING[1]:
            with graph.inserting_after(after):
                after = graph.call_function(operator.getitem, (chain, index))
        after.meta = dict(node.meta)
        node.replace_all_uses_with(after, delete_user_cb=lambda user: user not in members)
    for node in reversed(run):
        graph.erase_node(node)
    return True


def _view(node: fx.Node) -> str:
    return SLOTS if node.target == "permute" else FLATTEN


def _bound(node: fx.Node) -> list[Any]:
    """The call's arguments in the order of its schema."""
    given = dict(node.kwargs)
    arguments = OPS[NAMES[node.target]]._schema.arguments
    return [
        node.args[i] if i < len(node.args) else given.get(argument.name, argument.default_value)
        for i, argument in enumerate(arguments)
    ]
