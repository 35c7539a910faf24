"""From a step's arguments to the compiled function behind it, without Dynamo's part of every call.

Dynamo looks at its guards, gathers all Parameters of the model (hundreds, most of them packed long since) and hands them
through each layer of the compiler's wrappers: 0.9 ms a step at 24 layers. A decoder's steps are pure functions of their
tensors, so which function Dynamo chose, and which of its arguments stand where, is the same for the same shapes: learned
from one call, then called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import GlobalStateGuard

from qpass.runtime.kv import KVCache

Call = tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]
"""A compiled function, what it was called with and what it gave."""

_calls: ContextVar[list[Call] | None] = ContextVar("qpass_calls", default=None)


def note(function: Callable[..., Any], given: Sequence[Any], out: Sequence[Any]) -> None:
    """Tell whoever learns that a graph's compiled ``function`` was called so; for the backend."""
    calls = _calls.get()
    if calls is not None:
        calls.append((function, given, out))


@contextmanager
def _learning() -> Iterator[list[Call]]:
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


class Shortcut:
    """The compiled functions behind one step of ``model``, by the shapes of its arguments and torch's global state."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[Any, tuple[GlobalStateGuard, Callable[..., Any]]] = {}

    def __call__(self, step: Callable[..., Any], inputs: Sequence[Tensor], cache: KVCache) -> Any:
        """``step(*inputs, cache.keys, cache.values)``. Where it didn't come from one graph of ours, as it always was."""
        key = (cache.signature, *((t.shape, t.stride(), t.dtype) for t in inputs), len(set(map(id, inputs))))
        with torch.no_grad():
            known = self._known.get(key)
            if known is not None and known[0].check():
                return known[1](inputs, cache)
            with _learning() as calls:
                out = step(*inputs, cache.keys, cache.values)
            if len(calls) == 1:
                found = self._direct(calls[0], inputs, cache, out)
                if found is not None:
                    self._known[key] = GlobalStateGuard(), found
        return out

    def _direct(self, call: Call, inputs: Sequence[Tensor], cache: KVCache, out: Any) -> Callable[..., Any] | None:
        """The call again, of other inputs and another cache; None where something in it belongs to neither nor to the model."""
        function, given, gave = call
        places = {id(tensor): i for i, tensor in enumerate((*inputs, *cache.keys, *cache.values))}
        own = {id(tensor) for tensor in (*self._model.parameters(), *self._model.buffers())}
        if any(isinstance(g, Tensor) and id(g) not in places and id(g) not in own for g in given):
            return None
        template = [(places.get(id(g)), g) for g in given]
        fixed = [None if place is not None else value for place, value in template]
        moving = [(i, place) for i, (place, _) in enumerate(template) if place is not None]
        results = out if isinstance(out, tuple) else (out,)
        order = [next((i for i, g in enumerate(gave) if g is result), None) for result in results]
        if None in order:
            return None
        several = isinstance(out, tuple)

        def direct(inputs: Sequence[Tensor], cache: KVCache) -> Any:
            tensors = (*inputs, *cache.keys, *cache.values)
            arguments = fixed.copy()
            for i, place in moving:
                arguments[i] = tensors[place]
            gave = function(*arguments)
            return tuple(gave[i] for i in order) if several else gave[order[0]]

        return direct
