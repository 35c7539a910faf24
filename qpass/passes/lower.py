"""lower: each quantized linear goes to the first lowering that takes it; the others go back to torch."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.lowering import choose
from qpass.lowering.dense import emit_dense
from qpass.lowering.given import given_of
from qpass.lowering.measured import time_site, tokens_of
from qpass.lowering.site import Site
from qpass.ops.norm import apply_norm
from qpass.passes.attributes import attach, detach_unused
from qpass.passes.context import Context, SiteRecord
from qpass.passes.fold_smoothing import COLUMNS, OUTLIERS, ROWS
from qpass.passes.norms import NORM
from qpass.passes.values import tensor_of


def lower(graph: fx.Graph, ctx: Context) -> int:
    """Pack and place every quantized linear; returns how many. Raises UnsupportedError where the user's own choice refuses."""
    sites = list(graph.find_nodes(op="call_function", target=torch.ops.qpass.quantized_linear.default))
    for done, node in enumerate(sites):
        ctx.progress(done, len(sites), node.meta["qpass_names"][0])
        _lower_site(graph, node, ctx)
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.qpass.linear.default)):
        _leave(graph, node, ctx)
    for node in graph.find_nodes(op="call_function", target=NORM):
        node.target = apply_norm  # plain torch, for Inductor
    detach_unused(graph)
    return len(sites)


def _lower_site(graph: fx.Graph, node: fx.Node, ctx: Context) -> None:
    refs, scheme, names = node.meta["qpass_refs"], node.meta["qpass_scheme"], node.meta["qpass_names"]
    glu = bool(node.kwargs.get("glu", False))
    n, k = sum(ref.shape[0] for ref in refs), refs[0].shape[1]
    site = Site(names, n, k, scheme, refs[0].parameter.dtype, glu)
    lowering, refusals = choose(site, ctx.cpu, ctx.lowering)
    packed = ctx.weights.packed(refs, scheme.weight, lowering, glu=glu)
    m = tokens_of(tensor_of(node.args[0]))
    given = next((g for ref in refs if (g := given_of(ref.parameter)) is not None), None)
    own = given is None and not any(ctx.weights.is_released(ref.parameter) for ref in refs)
    timing = time_site(site, m, lowering, packed, refs if own else None, ctx.cpu)
    inputs = {id(ctx.parameters[p.name]): p for p in graph.find_nodes(op="placeholder") if p.name in ctx.parameters}
    stays = timing is not None and timing.loses and not ctx.insist and all(id(r.parameter) in inputs for r in refs)
    if stays:
        with graph.inserting_before(node):
            scaled = [attach(graph, "qpass_scaling", t) if t is not None else None for t in _scalings(node)]
        new = emit_dense(graph, node, [(inputs[id(ref.parameter)], ref.transposed) for ref in refs], *scaled)
        refusals = (*refusals, f"{lowering.name}: slower than the layer as it is ({timing})")
    else:
        with graph.inserting_before(node):
            attributes = tuple(attach(graph, "qpass_packed", tensor) for tensor in packed)
        new = lowering.emit(graph, node, attributes)
        ctx.quantized.update((f"{name}.weight", ref.parameter) for name, ref in zip(names, refs, strict=True))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    before = sum(ref.parameter.numel() * ref.parameter.element_size() for ref in refs)
    ctx.records.append(
        SiteRecord(
            names=names,
            name=site.name,
            n=n,
            k=k,
            scheme="w16a16" if stays else scheme.name,
            lowering="inductor" if stays else lowering.name,
            fused=node.meta.get("qpass_fused", ()),
            bytes_before=before,
            bytes_after=before if stays else sum(tensor.numel() * tensor.element_size() for tensor in packed),
            notes=(
                *(() if given is None else (f"codes from {given.source}",)),
                *node.meta.get("qpass_notes", ()),
                *refusals,
            ),
            same_rows=0 if stays else lowering.same_rows(site, ctx.cpu),
            m=timing.m if timing else 0,
            predicted_ms=timing.predicted_ms if timing else None,
            measured_ms=timing.ms if timing else None,
            dense_ms=timing.dense_ms if timing else None,
        )
    )


def _scalings(node: fx.Node) -> tuple[Tensor | None, Tensor | None]:
    """What smoothing multiplied the node's weights and divided its input by: columns [K], rows [N]."""
    return None if OUTLIERS in node.meta else node.meta.get(COLUMNS), node.meta.get(ROWS)


def _leave(graph: fx.Graph, node: fx.Node, ctx: Context) -> None:
    """Back to ``torch.nn.functional.linear``, for Inductor."""
    x, weights, biases = node.args
    with graph.inserting_before(node):
        outputs = [graph.call_function(torch._C._nn.linear, (x, w, b)) for w, b in zip(weights, biases, strict=True)]
        new = outputs[0] if len(outputs) == 1 else graph.call_function(torch.cat, (outputs, -1))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    for name, weight in zip(node.meta["qpass_names"], weights, strict=True):
        ref = ctx.weight_ref(weight)
        assert ref is not None
        size = ref.parameter.numel() * ref.parameter.element_size()
        ctx.records.append(
            SiteRecord((name,), name, *ref.shape, "w16a16", "inductor", bytes_before=size, bytes_after=size)
        )
