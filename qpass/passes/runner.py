"""The runner: each pass in turn on a copy of the graph, checked and traced after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from qpass.errors import QpassError
from qpass.passes.context import Context
from qpass.passes.trace import Trace
from qpass.passes.vocabulary import check

Pass = Callable[[fx.Graph, Context], int]


def run(gm: fx.GraphModule, ctx: Context, pipeline: Sequence[Pass]) -> tuple[fx.GraphModule, dict[str, int]]:
    """The rewritten copy of ``gm`` and each pass's count. ``gm`` itself is never touched, whatever fails.

    Raises QpassError when a pass leaves a malformed graph, or one that speaks another vocabulary than its stage's.
    A pass's own QpassError (a refusal of what the user asked for) comes through as it is.
    """
    copied = copy_graph_module(gm)
    trace = Trace.from_environment()
    trace.write("capture", copied.graph)
    counts: dict[str, int] = {}
    for step in pipeline:
        name = step.__name__
        try:
            counts[name] = step(copied.graph, ctx)
            copied.graph.lint()
            complaints = check(name, copied.graph, ctx)
        except QpassError:
            trace.write(name, copied.graph)
            raise
        except Exception as error:
            trace.write(name, copied.graph)
            raise QpassError(f"internal error in pass {name}: {type(error).__name__}: {error}{trace.hint()}") from error
        trace.write(name, copied.graph, counts[name])
        if complaints:
            raise QpassError(f"internal error: pass {name} left {'; '.join(complaints)}{trace.hint()}")
    copied.recompile()
    return copied, counts


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A module with its own graph and its own attribute table; tensors are shared, nodes and metas are not."""
    graph, mapping = fx.Graph(tracer_cls=gm.graph._tracer_cls), {}
    result = graph.graph_copy(gm.graph, mapping)
    output = graph.output(result)
    for node in gm.graph.nodes:
        twin = output if node.op == "output" else mapping[node]
        twin.meta = dict(node.meta)
        if hasattr(node, "_dynamo_source"):  # AOTAutograd looks for it on every placeholder
            twin._dynamo_source = node._dynamo_source
    copied = fx.GraphModule(gm, graph, type(gm).__name__)
    copied.meta = dict(gm.meta)
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        copied._param_name_to_source = dict(sources)
    return copied
