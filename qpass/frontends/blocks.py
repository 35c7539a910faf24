"""A model as blocks that run one after the other, so that a calibration holds one of them at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import OptionError

WHOLE = 0.8
"""Share of a model's linear weights that its blocks must hold; a model with less in them is calibrated as one block."""

OUTER_NAMES = frozenset({"lm_head", "embed_out", "score", "classifier"})
"""Heads: behind the blocks, and not counted among the weights that blocks should hold."""


@dataclass
class Call:
    """How one block is called for one batch, besides the hidden states: the position of these is held by None."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None  # the hidden states' name, where they are no positional argument

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if self.keyword is not None:
            out = block(*self.args, **{**self.kwargs, self.keyword: hidden})
        else:
            out = block(hidden, *self.args, **self.kwargs)
        return out if isinstance(out, Tensor) else out[0]


@dataclass
class Blocks:
    """Blocks in the order in which they run, and for each batch what reaches the first and how each is called.

    ``hidden`` moves forward with :meth:`advance`, through blocks that are quantized by then, and ``originals`` with
    :meth:`run_original`, through the same blocks before. A model without blocks is one block whose calls are the model's
    own: it has nothing to advance to.
    """

    names: list[str]
    modules: list[nn.Module]
    hidden: list[Tensor] = field(default_factory=list)  # one [B, L, D] a batch
    originals: list[Tensor] = field(default_factory=list)  # the same, had no block been quantized
    calls: list[list[Call]] = field(default_factory=list)  # by block, by batch
    batches: list[tuple[tuple, dict]] = field(default_factory=list)  # of a model without blocks

    @property
    def is_whole(self) -> bool:
        return bool(self.batches)

    def run(self, index: int, batch: int) -> Any:
        """Block ``index`` on what reaches it; of a model without blocks, the model."""
        if self.is_whole:
            args, kwargs = self.batches[batch]
            return self.modules[index](*args, **kwargs)
        return self.calls[index][batch].run(self.modules[index], self.hidden[batch])

    def run_original(self, index: int, batch: int) -> None:
        """Block ``index``, not quantized yet, on what the original model gives it; ``originals`` moves forward."""
        self.originals[batch] = self.calls[index][batch].run(self.modules[index], self.originals[batch])

    def advance(self, index: int, done: Callable[[], None] = lambda: None) -> None:
        """Replace what reached block ``index`` by what leaves it, as it is now."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run(index, batch)
            done()
        self.calls[index] = []


def split(model: nn.Module, batches: Sequence[tuple[tuple, dict]]) -> Blocks:
    """Find the model's blocks and what reaches the first one; ``batches`` are arguments of the model's forward.

    Blocks are the children of the ModuleList with the most weights, where one batch shows that each takes what the one
    before gave. A model without such a list, or with much of its weights outside of it, becomes one block. Raises
    OptionError where the model's own output isn't finite.
    """
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    batches = [(args, {**kwargs, **extra}) for args, kwargs in batches]
    for name, children in _candidates(model):
        kinds = _chain(model, children, batches[0])
        if kinds is None:
            continue
        blocks = Blocks([f"{name}.{i}" if name else str(i) for i in range(len(children))], children)
        blocks.calls = [[] for _ in children]
        interned: dict[int, Any] = {}
        for batch in batches:
            _record(model, blocks, kinds, batch, interned)
        blocks.originals = list(blocks.hidden)
        return blocks
    for args, kwargs in batches[:1]:
        _check_finite(model(*args, **kwargs))
    return Blocks([""], [model], batches=list(batches))


def _candidates(model: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """ModuleLists and Sequentials that hold most of the linear weights, the outermost first."""
    outer = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in OUTER_NAMES}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    everything = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() >= 2 and id(p) not in tables and name.rpartition(".")[0] not in outer
    )
    found = [
        (name, list(module), sum(p.numel() for p in module.parameters() if p.dim() >= 2))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    ]
    return [(name, children) for name, children, held in found if held >= WHOLE * everything]


class _Stop(BaseException):
    """Nothing behind the blocks needs to run."""


def _chain(model: nn.Module, children: list[nn.Module], batch: tuple[tuple, dict]) -> list[Any] | None:
    """What each child returns besides its hidden states, where they run as a chain; None where they don't."""
    kinds: list[Any] = []
    previous: list[Tensor] = []
    broken: list[bool] = []

    def after(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        hidden, _, _, _ = _split(args, kwargs)
        result = out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) and out else None
        position = len(kinds)
        if hidden is None or not isinstance(result, Tensor) or result.shape != hidden.shape:
            broken.append(True)
            raise _Stop
        if position >= len(children) or module is not children[position] or (previous and hidden is not previous[0]):
            broken.append(True)
            raise _Stop
        previous[:] = [result]
        kinds.append(None if isinstance(out, Tensor) else out[1:])
        if position == len(children) - 1:
            _check_finite(result)
            raise _Stop

    hooks = [child.register_forward_hook(after, with_kwargs=True) for child in children]
    try:
        model(*batch[0], **batch[1])
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return kinds if not broken and len(kinds) == len(children) else None


def _record(model: nn.Module, blocks: Blocks, kinds: list[Any], batch: tuple, interned: dict[int, Any]) -> None:
    """Run the model with blocks that only note how they are called, and give on what they got."""

    def noting(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, keyword, rest, named = _split(args, kwargs)
            assert hidden is not None  # the chain of the first batch had them
            if index == 0:
                blocks.hidden.append(hidden)
            shared = {name: _intern(value, interned, name) for name, value in named.items()}
            others = tuple(_intern(value, interned, str(i)) for i, value in enumerate(rest))
            blocks.calls[index].append(Call(others, shared, keyword))
            if index == len(kinds) - 1:
                raise _Stop
            return hidden if kinds[index] is None else (hidden, *kinds[index])

        return forward

    with _replaced(blocks.modules, noting):
        try:
            model(*batch[0], **batch[1])
        except _Stop:
            return


@contextmanager
def _replaced(modules: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """The modules with another forward each, for a while."""
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = make(index)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own


def _split(args: tuple, kwargs: dict) -> tuple[Tensor | None, str | None, tuple, dict]:
    """(hidden states, their name where they have one, other arguments, other named arguments)."""
    if args and isinstance(args[0], Tensor):
        return args[0], None, args[1:], kwargs
    if not args and isinstance(kwargs.get("hidden_states"), Tensor):
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return kwargs["hidden_states"], "hidden_states", (), rest
    return None, None, args, kwargs


def _intern(value: Any, interned: dict, place: str) -> Any:
    """The equal value of the batch or block before, so that masks and rotary tables are held once."""
    if isinstance(value, tuple):
        return tuple(_intern(v, interned, f"{place}.{i}") for i, v in enumerate(value))
    if not isinstance(value, Tensor):
        return value
    for seen in interned.setdefault(place, []):
        if seen is value or (seen.shape == value.shape and seen.dtype == value.dtype and torch.equal(seen, value)):
            return seen
    interned[place] = [value, *interned[place][:3]]
    return value


def _check_finite(out: Any) -> None:
    for value in out.values() if isinstance(out, dict) else out if isinstance(out, tuple | list) else (out,):
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise OptionError("the model's own output holds NaN or infinity for the first batch of the calibration")
