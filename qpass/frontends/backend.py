"""The backend behind ``torch.compile(model, backend="qpass")``: capture in, compiled function out."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import ShortenTraceback
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

import qpass.ops  # noqa: F401  registers torch.ops.qpass
from qpass.algorithms.rtn import rtn
from qpass.cpu import detect
from qpass.errors import QpassError, ReleasedWeightError, UnsupportedError
from qpass.frontends import progress, reports
from qpass.frontends.options import Options
from qpass.kernels.build import find_compiler
from qpass.lowering.released import release, released_name, return_memory
from qpass.lowering.store import WeightStore
from qpass.passes import run_pipeline
from qpass.passes.context import Context, parameters_of
from qpass.runtime import shortcut

STORE = WeightStore(algorithm=rtn, is_released=released_name)
"""One a process: a weight that several compiled models share is packed once."""

INDUCTOR = {"size_asserts": False, "alignment_asserts": False}
"""The wrapper's checks of every buffer's size and stride cost a step of 30 layers 400 calls; our ops check what they are given."""

_kept: dict[int, weakref.ref[Tensor]] = {}  # parameters that some compiled graph still reads as they are


def qpass_backend(
    gm: fx.GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The function that the entry point ``torch_dynamo_backends: qpass`` names."""
    try:
        chosen = Options.from_compile(options, mode)
    except QpassError as error:
        raise _plain(error) from error.__cause__
    return compile_graph(gm, example_inputs, chosen, owner=options, check_names=chosen.assignment.check)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: Options,
    *,
    owner: Any,
    module: nn.Module | None = None,
    check_names: Callable[[list[str]], None] = lambda names: None,
) -> Callable[..., Any]:
    """Run the pipeline on a copy of ``gm`` and hand the rest to Inductor. The result runs without autograd.

    ``check_names`` sees the names of the graph's linears before any is quantized. Raises UnsupportedError for a graph
    that can't be served (device, training, inputs that require grad, no compiler), and the pipeline's own errors. No
    error becomes a silent eager run.
    """
    try:
        if module is not None and module.training:
            name = type(module).__name__
            raise UnsupportedError(f"{name} is in training mode; qpass compiles for inference only: call .eval() first")
        return _compile(gm, example_inputs, options, owner, check_names)
    except QpassError as error:
        raise _plain(error) from error.__cause__


def _plain(error: QpassError) -> Exception:
    """The same error in a form that Dynamo lets through as it is, without wrapping it in one of its own."""
    kind = type(error)
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind, ShortenTraceback), body)(*error.args, first_useful_frame=None)


def _compile(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: Options,
    owner: Any,
    check_names: Callable[[list[str]], None],
) -> Callable[..., Any]:
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    _check(gm, placeholders, example_inputs)
    parameters = parameters_of(gm, example_inputs)
    started = time.perf_counter()
    with torch.no_grad(), progress.quantizing() as show:
        ctx = Context(
            parameters=parameters,
            scheme_of=options.assignment,
            cpu=detect(),
            weights=STORE,
            lowering=options.lowering,
            calibrated=options.calibrated,
            insist=options.insist or options.lowering is not None or options.release_weights,
            check_names=check_names,
            progress=show,
        )
        lowered, counts = run_pipeline(gm, ctx)
    _check_reads(lowered, parameters)
    released = _release(ctx) if options.release_weights else 0
    used = _drop_parameters(lowered, parameters)
    packed_at = time.perf_counter()
    try:
        with torch.no_grad(), progress.waiting("compiling the graph"):
            inputs = [example_inputs[i] for i in used]
            # declared to give what export's callers want, too
            compiled = cast("Callable[..., Any]", compile_fx(lowered, inputs, config_patches=INDUCTOR))
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        # Dynamo would answer these with a graph break and an eager run, without a word.
        raise QpassError(f"Inductor could not compile the rewritten graph: {error}") from error
    reports.add(
        reports.GraphReport(
            records=tuple(ctx.records),
            counts=counts,
            left=ctx.left,
            passes_seconds=packed_at - started,
            inductor_seconds=time.perf_counter() - packed_at,
            released_bytes=released,
            owner=owner,
            parameters=tuple(weakref.ref(p) for p in parameters.values()),
        )
    )

    def run(*args: Any) -> Any:
        given = [args[i] for i in used]
        with torch.no_grad():
            out = compiled(*given)
        shortcut.note(compiled, given, out)
        return out

    return run


def _check(gm: fx.GraphModule, placeholders: list[fx.Node], example_inputs: list[Any]) -> None:
    for node, value in zip(placeholders, example_inputs, strict=True):
        if not isinstance(value, Tensor):
            continue
        name = str(node.target)
        if value.device.type != "cpu":
            raise UnsupportedError(
                f"{name} is on {value.device}; qpass compiles for the CPU: move the model with .to('cpu')"
            )
        if value.requires_grad and torch.is_grad_enabled() and not isinstance(value, nn.Parameter):
            raise UnsupportedError(
                f"the input {name} requires grad; qpass compiles for inference only: pass it detached"
            )
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is nn.functional.dropout and _drops(node):
            raise UnsupportedError(
                f"{node.name} is a dropout in training mode; qpass compiles for inference only: call model.eval() first"
            )
    find_compiler()


def _drops(node: fx.Node) -> bool:
    given = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | dict(node.kwargs)
    return bool(given.get("training", True) and given.get("p", 0.5) != 0)


def _used(gm: fx.GraphModule, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that the graph still reads."""
    return {
        node.name: parameters[node.name]
        for node in gm.graph.find_nodes(op="placeholder")
        if node.name in parameters and node.users
    }


def _check_reads(gm: fx.GraphModule, parameters: dict[str, Tensor]) -> None:
    for parameter in _used(gm, parameters).values():
        name = released_name(parameter)
        if name is not None:
            raise ReleasedWeightError(
                f"{name}: its full-precision data was released, and a new graph reads it unquantized; compile with release_weights=False"
            )
        _keep(parameter)


def _drop_parameters(gm: fx.GraphModule, parameters: dict[str, Tensor]) -> list[int]:
    """Take packed Parameters out of the graph's inputs, each of which costs a call its time; the indices of those that stay."""
    used = []
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if node.users or node.name not in parameters:
            used.append(i)
        else:
            gm.graph.erase_node(node)
    gm.recompile()
    return used


def _keep(parameter: Tensor) -> None:
    key = id(parameter)
    _kept[key] = weakref.ref(parameter, lambda _: _kept.pop(key, None))


def _release(ctx: Context) -> int:
    """Free every quantized weight that no compiled graph reads any more; returns the bytes."""
    freed = 0
    for name, parameter in ctx.quantized.items():
        if id(parameter) not in _kept:
            freed += release(parameter, name)
    if freed:
        return_memory()
    return freed
