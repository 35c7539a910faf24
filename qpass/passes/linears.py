"""Every way to write a linear layer over a Parameter, and the one that the later passes know: ``qpass.linear``."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from qpass.errors import UnsupportedError
from qpass.lowering.store import WeightRef
from qpass.passes.context import Context
from qpass.passes.names import Names
from qpass.passes.values import (
    VALUE,
    Writes,
    argument,
    erase_if_unused,
    only_user,
    respell,
    same_sizes,
    set_value,
    tensor_of,
    value_of,
)

LINEAR = torch.ops.qpass.linear.default
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_LINEARS = frozenset({F.linear, torch.ops.aten.linear.default})
_PRODUCTS = frozenset({operator.matmul, torch.matmul, torch.mm, "matmul", "mm", "__matmul__"})
_ADDMMS = frozenset({torch.addmm, "addmm"})
_TRANSPOSES = frozenset({torch.t, "t", torch.transpose, "transpose", "swapaxes", torch.permute, "permute"})
_ROW_VIEWS = frozenset({"view", "reshape", torch.reshape, "flatten", torch.flatten})


@dataclass(frozen=True)
class _Operands:
    x: fx.Node
    weight: fx.Node  # [N, K], or [K, N] when ``transposed``
    transposed: bool
    bias: fx.Node | None
    explicit: bool  # written as a linear layer, not as a product that may be anything


def spell_linear(node: fx.Node, ctx: Context, names: Names, writes: Writes) -> bool:
    """Rewrite one linear over a 2-D Parameter, or note in ``ctx.left`` why it stays."""
    found = _operands(node)
    if found is None:
        return False
    weight, transposed = _strip_transposes(found.weight, found.transposed)
    ref = ctx.weight_ref(weight)
    if ref is None and not found.explicit and (weight.op != "placeholder" or weight.name not in ctx.parameters):
        if ctx.weight_ref(found.x) is not None:
            ctx.left[names.linear(node, found.x)] = "its weight stands on the left of the product"
        return False  # else a product of two activations, such as attention scores
    name = names.linear(node, weight if weight.name in ctx.parameters else None)
    ref = None if ref is None else WeightRef(ref.parameter, transposed)
    if ref is not None and ref.parameter.dtype not in DTYPES and ctx.scheme_of(name, ctx.is_tied(weight)).quantizes:
        accepted = ", ".join(map(_short, DTYPES))
        raise UnsupportedError(
            f"{name}: its weight is {_short(ref.parameter.dtype)}; accepted: {accepted}, or exclude it"
        )
    reason = _refuse(node, found.x, weight, ref, ctx, writes)
    if reason is not None or ref is None:
        ctx.left[name] = reason or "its weight is not a Parameter"
        return False
    bias_is_parameter = _is_bias(found.bias, ref, ctx, writes)
    operand = weight
    if transposed:
        with node.graph.inserting_before(node):
            operand = node.graph.call_function(torch.t, (weight,))
        set_value(operand)
    bias = found.bias
    if bias is not None and not bias_is_parameter:
        _split_bias(node, found.x, operand, bias, name)
    else:
        respell(node, LINEAR, (found.x, [operand], [bias]))
        node.meta["qpass_names"] = (name,)
    _erase_chain(found.weight)
    return True


def unflatten_rows(node: fx.Node, writes: Writes) -> bool:
    """``view(linear(view(x, (-1, K))), (*x.shape[:-1], N))`` -> ``linear(x)``: transformers' Conv1D."""
    if node.target is not LINEAR or node.op != "call_function":
        return False
    rows, after = node.args[0], only_user(node)
    if not isinstance(rows, fx.Node) or not _is_row_view(rows) or after is None or not _is_row_view(after):
        return False
    x = rows.args[0]
    before, inner, outer = tensor_of(x), tensor_of(rows), tensor_of(after)
    if not isinstance(x, fx.Node) or before is None or inner is None or outer is None or outer.dim() < 1:
        return False
    if writes.touch(x, node):
        return False
    if not same_sizes(before.shape[-1:], inner.shape[-1:]) or not same_sizes(before.shape[:-1], outer.shape[:-1]):
        return False
    if not same_sizes(outer.shape[-1:], tensor_of(node).shape[-1:]):  # type: ignore[union-attr]
        return False
    node.args = (x, *node.args[1:])
    node.meta[VALUE] = outer
    after.replace_all_uses_with(node)
    node.graph.erase_node(after)
    erase_if_unused(rows)
    return True


def absorb_bias(node: fx.Node, ctx: Context, writes: Writes) -> bool:
    """``linear(x, W) + b`` with a Parameter ``b [N]`` -> ``linear(x, W, b)``: Falcon."""
    if node.op != "call_function" or node.target is not operator.add:
        return False
    for linear, bias in (node.args, node.args[::-1]):
        if not isinstance(linear, fx.Node) or linear.target is not LINEAR or only_user(linear) is not node:
            continue
        x, (weight,), (present,) = linear.args
        ref = ctx.weight_ref(weight)
        if present is not None or ref is None or not isinstance(bias, fx.Node) or not _is_bias(bias, ref, ctx, writes):
            continue
        if writes.touch(linear) or writes.touch(node):
            continue
        linear.args = (x, [weight], [bias])
        linear.meta[VALUE] = value_of(node)
        node.replace_all_uses_with(linear)
        node.graph.erase_node(node)
        return True
    return False


def is_unspelled(node: fx.Node, ctx: Context) -> fx.Node | None:
    """The Parameter over which a node is still a linear in one of its old spellings."""
    found = _operands(node)
    if found is None:
        return None
    weight, _ = _strip_transposes(found.weight, found.transposed)
    return weight if ctx.weight_ref(weight) is not None else None


def note_experts(graph: fx.Graph, ctx: Context, names: Names) -> None:
    """Say in ``ctx.left`` which 3-D Parameters are multiplied expert by expert: no lowering takes them yet."""
    for placeholder in graph.find_nodes(op="placeholder"):
        parameter = ctx.parameters.get(placeholder.name)
        if parameter is not None and parameter.dim() == 3 and _reaches_product(placeholder):
            dtype = str(parameter.dtype).removeprefix("torch.")
            ctx.left[names.parameter(placeholder)] = f"3-D expert weights stay in {dtype}"


def note_nested(graph: fx.Graph, ctx: Context) -> None:
    """Say in ``ctx.left`` that the linears inside a nested graph (of a checkpoint, of a branch) are not looked at."""
    for node in graph.find_nodes(op="get_attr"):
        nested = getattr(graph.owning_module, str(node.target), None)
        if isinstance(nested, fx.GraphModule) and any(n.target in _LINEARS for n in nested.graph.nodes):
            ctx.left[str(node.target)] = "its linears are inside a nested graph and stay as they are"


def _operands(node: fx.Node) -> _Operands | None:
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _LINEARS:
        x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
        transposed, explicit = False, True
    elif node.target in _ADDMMS:
        bias, x, weight = (argument(node, i, name) for i, name in enumerate(("input", "mat1", "mat2")))
        transposed, explicit = True, False
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1 or "out" in node.kwargs:
            return None
    elif node.target in _PRODUCTS:
        second = "mat2" if node.target in (torch.mm, "mm") else "other"
        x, weight, bias = argument(node, 0, "input"), argument(node, 1, second), None
        transposed, explicit = True, False
        if "out" in node.kwargs:
            return None
    else:
        return None
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    return _Operands(x, weight, transposed, bias if isinstance(bias, fx.Node) else None, explicit)


def _strip_transposes(weight: fx.Node, transposed: bool) -> tuple[fx.Node, bool]:
    while _is_transpose(weight):
        weight, transposed = weight.args[0], not transposed  # type: ignore[assignment]
    return weight, transposed


def _is_transpose(node: fx.Node) -> bool:
    """``W.T``, ``W.mT``, ``W.t()``, ``W.transpose(0, 1)`` and the like, of a matrix."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before = tensor_of(node.args[0])
    if before is None or before.dim() != 2:
        return False
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("T", "mT")
    if node.op not in ("call_function", "call_method") or node.target not in _TRANSPOSES:
        return False
    rest = node.args[1:] or tuple(node.kwargs.values())
    if node.target in (torch.t, "t"):
        return True
    order = [d % 2 for d in (rest[0] if rest and isinstance(rest[0], tuple | list) else rest) if isinstance(d, int)]
    return order == [1, 0] or (order == [0, 1] and node.target not in (torch.permute, "permute"))


def _refuse(
    node: fx.Node, x: fx.Node, weight: fx.Node, ref: WeightRef | None, ctx: Context, writes: Writes
) -> str | None:
    if ref is None:
        parameter = ctx.parameters.get(weight.name)
        if parameter is not None:
            return f"its weight has shape {list(parameter.shape)}; a matrix is needed"
        return (
            "its weight is an input of the graph, not a Parameter"
            if weight.op in ("placeholder", "get_attr")
            else "its weight is computed in the graph"
        )
    given, result, dtype = tensor_of(x), tensor_of(node), ref.parameter.dtype
    if given is None or result is None:
        return "its shapes are unknown, as inside torch.vmap"
    if dtype not in DTYPES:
        return f"its weight is {_short(dtype)}; served are {', '.join(map(_short, DTYPES))}"
    if given.dtype != dtype:
        return f"its input is {_short(given.dtype)} but its weight {_short(dtype)}"
    if result.dtype != dtype:
        return f"it runs under autocast: its weight is {_short(dtype)} but its output {_short(result.dtype)}"
    if writes.touch(weight):
        return "its weight is written to in the graph"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_bias(bias: fx.Node | None, ref: WeightRef, ctx: Context, writes: Writes) -> bool:
    """A Parameter [N] of the weight's dtype that nobody writes to; or none at all."""
    if bias is None:
        return True
    parameter = ctx.parameters.get(bias.name) if bias.op in ("placeholder", "get_attr") else None
    if parameter is None or writes.touch(bias):
        return False
    return tuple(parameter.shape) == (ref.shape[0],) and parameter.dtype == ref.parameter.dtype


def _split_bias(node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node, name: str) -> None:
    """A bias that is computed: the node becomes the addition, behind a linear without one."""
    with node.graph.inserting_before(node):
        linear = node.graph.call_function(LINEAR, (x, [weight], [None]))
    linear.meta = dict(node.meta) | {"qpass_names": (name,)}
    set_value(linear)
    respell(node, operator.add, (linear, bias))


def _erase_chain(node: fx.Node) -> None:
    """Erase transposes that only the old spelling read."""
    while _is_transpose(node) and not node.users:
        node, dead = node.args[0], node  # type: ignore[assignment]
        dead.graph.erase_node(dead)


def _is_row_view(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _ROW_VIEWS


_CARRIERS: frozenset[Any] = (
    _TRANSPOSES | _ROW_VIEWS | {operator.getitem, "to", "contiguous", "unbind", torch.unbind, "mT", getattr}
)


def _reaches_product(node: fx.Node, depth: int = 4) -> bool:
    products = _PRODUCTS | _ADDMMS | _LINEARS | {torch.bmm, "bmm", torch.baddbmm, "baddbmm", torch.einsum}
    for user in node.users:
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        if user.target in products or "grouped_mm" in name:
            return True
        if depth and user.target in _CARRIERS and _reaches_product(user, depth - 1):
            return True
    return False
