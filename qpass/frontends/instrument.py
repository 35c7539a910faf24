"""A model whose linears run through a function of ours: the sites that the passes rewrite, on plain torch, without a compiler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpass.algorithms.rtn import rtn
from qpass.assignment import Assignment
from qpass.cpu import detect
from qpass.errors import OptionError, QpassError, UnsupportedError, raise_ours
from qpass.lowering.store import WeightRef, WeightStore
from qpass.passes.canonicalize import canonicalize
from qpass.passes.context import Context, parameters_of
from qpass.passes.linears import LINEAR
from qpass.passes.runner import run
from qpass.passes.values import Writes


@dataclass(frozen=True, eq=False)
class Reader:
    """One linear of a graph: the module's name, its weight, and whether an embedding reads the same Parameter."""

    name: str
    ref: WeightRef
    tied: bool


@dataclass(frozen=True, eq=False)
class Shared:
    """One input and the linears that read it, in graph order."""

    readers: tuple[Reader, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(reader.name for reader in self.readers)


Enter = Callable[[Shared, Tensor], None]
Linear = Callable[[Reader, Tensor, Tensor, Tensor | None], Tensor]
"""(linear, x [..., K], its weight [N, K], its bias [N]) -> [..., N]"""


def plain_linear(reader: Reader, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x, weight, bias)


def instrument(
    model: nn.Module, *, enter: Enter = lambda shared, x: None, linear: Linear = plain_linear, limit: int = 64
) -> Callable[[Any], Any]:
    """A function that runs ``model`` on a batch (a tensor, a tuple of arguments, a mapping of them), graphs uncompiled.

    ``enter`` sees each input that linears read, once a call; ``linear`` computes each. The model is not touched.
    ``limit`` is how often torch may compile it anew, for other shapes of batches; what goes beyond is a QpassError. Raises
    UnsupportedError for a batch or a weight that is not on the CPU, and for a model in training mode.
    """
    _check(model)
    found, entered = 0, 0  # linears in the graphs, and inputs that went through them

    def counted(shared: Shared, x: Tensor) -> None:
        nonlocal entered
        entered += 1
        enter(shared, x)

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        ctx = Context(
            parameters=parameters_of(gm, example_inputs),
            scheme_of=Assignment.make("w16a16"),
            cpu=detect(),
            weights=WeightStore(algorithm=rtn),
        )

        def insert_calls(graph: fx.Graph, ctx: Context) -> int:
            return _insert_calls(graph, ctx, counted, linear)

        nonlocal found
        rewritten, counts = run(gm, ctx, (canonicalize, insert_calls))
        found += counts["insert_calls"]
        return rewritten.forward

    # A cache of its own: the model's other compiled forms stay, and don't count towards this one's limit.
    compiled = torch.compile(model, backend=backend, isolate_recompiles=True, recompile_limit=limit)  # type: ignore[call-overload]
    extra = _without_cache(model)

    def call(batch: Any) -> Any:
        args, kwargs = _arguments(batch)
        before = entered
        try:
            with torch.no_grad():
                result = compiled(*args, **(extra | kwargs))
        except Exception as error:
            raise_ours(error)
            raise
        if found and entered == before:  # Dynamo's answer to too many recompiles is an eager run, without a word
            raise QpassError(
                f"{type(model).__name__} ran without its graphs: torch gave up compiling it, as it does after too many recompiles "
                "(TORCH_LOGS=recompiles says why)"
            )
        return result

    return call


def _insert_calls(graph: fx.Graph, ctx: Context, enter: Enter, linear: Linear) -> int:
    nodes = list(graph.find_nodes(op="call_function", target=LINEAR))
    families: dict[fx.Node, list[tuple[fx.Node, Reader]]] = {}
    for node in nodes:
        x, weight = node.args[0], node.args[1][0]  # type: ignore[index]
        ref = ctx.weight_ref(weight)
        assert ref is not None
        families.setdefault(x, []).append((node, Reader(node.meta["qpass_names"][0], ref, ctx.is_tied(weight))))
    writes = Writes(graph)
    for family in families.values():
        x = family[0][0].args[0]  # not the key, which may have been a linear that is replaced by now
        # Where x is written to, each reads it at another time.
        groups = [[member] for member in family] if writes.touch(x) else [family]
        for group in groups:
            shared = Shared(tuple(reader for _, reader in group))
            with graph.inserting_before(group[0][0]):
                graph.call_function(_entering(enter, shared), (x,))
            for node, reader in group:
                weight, bias = node.args[1][0], node.args[2][0]  # type: ignore[index]
                with graph.inserting_before(node):
                    new = graph.call_function(_computing(linear, reader), (x, weight, bias))
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
                graph.erase_node(node)
    return len(nodes)


def _entering(enter: Enter, shared: Shared) -> Callable[[Tensor], None]:
    def entering(x: Tensor) -> None:
        enter(shared, x)

    return entering


def _computing(linear: Linear, reader: Reader) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    def computing(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(reader, x, weight, bias)

    return computing


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(f"a model is an nn.Module here, not {type(model).__name__}")
    if model.training:
        raise UnsupportedError(f"{type(model).__name__} is in training mode: call .eval() first")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise UnsupportedError(
                f"{name} is on {parameter.device}; qpass runs on the CPU: move the model with .to('cpu')"
            )


def _without_cache(model: nn.Module) -> dict[str, Any]:
    """transformers' models fill a cache unless told otherwise."""
    takes = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    return {"use_cache": False} if hasattr(config, "use_cache") and "use_cache" in takes else {}


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = (
        ((), dict(batch))
        if isinstance(batch, Mapping)
        else (tuple(batch) if isinstance(batch, list | tuple) else (batch,), {})
    )
    kwargs.pop("labels", None)  # of a training set: no loss is wanted here
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.device.type != "cpu":
            raise UnsupportedError(f"a batch is on {value.device}; qpass runs on the CPU: move it with .to('cpu')")
    return args, kwargs
