"""``qpass.compile``: a model, an nn.Module class or a function in; the same thing, compiled, out."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import external_utils, trace_rules

from qpass.errors import OptionError, UnsupportedError
from qpass.frontends.backend import compile_graph
from qpass.frontends.options import Options


class _Backend:
    """The backend of one ``qpass.compile`` call; knows the module, whose training flag no graph shows."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.module: Callable[[], nn.Module | None] = lambda: None  # weak: the module owns us

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(gm, example_inputs, self.options, owner=self, module=self.module())


def compile(
    model: Any = None,
    *,
    scheme: Any = None,
    exclude: Any = (),
    lowering: str | None = None,
    release_weights: bool = False,
    insist: bool = False,
    stats: Any = None,
    alpha: Any = "auto",
    recipe: Any = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Any:
    """Compile ``model`` for inference on this CPU with quantized linear layers.

    model            an nn.Module: returned is a shallow copy that shares all weights, whose call (and so ``generate``)
                     is compiled; the original stays as it was. Or an nn.Module class (its instances are compiled) or a
                     function that closes over modules. None: a decorator.
    scheme           a name ("w8a16", the default; "w4a16-g128"), a table {module pattern: name}, or a function of the
                     module name that returns a name or None (None: the default)
    exclude          module patterns that keep their weights as they are
    lowering         the only lowering to use ("generated", "onednn", "aten", "reference"); by default the first that can
    release_weights  free the full-precision weights as they are packed; any other use of them raises
                     ReleasedWeightError from then on
    insist           quantize every chosen layer, even one that is timed at compilation and found slower than as it was
                     (its M tokens decide); implied by ``lowering`` and by ``release_weights``
    stats            what ``qpass.calibrate`` saw, or a file of it: int8 activations are smoothed by it, and a static
                     scheme ("w8a8-static") takes its scales from it
    alpha            how much smoothing moves from activations into weights: "auto" (what costs each layer's output least; an input
                     that no alpha flattens is rotated as well),
                     a number from 0 to 1, a table {module pattern: one of these}, or None for no smoothing
    recipe           what ``qpass.search`` found, or a file of it, in the place of ``scheme``
    dynamic, fullgraph  as for ``torch.compile``

    Compilation happens at the first call. Raises OptionError, SchemeError, UnsupportedError.
    """
    options = Options.make(
        scheme=scheme,
        exclude=exclude,
        lowering=lowering,
        release_weights=release_weights,
        insist=insist,
        stats=stats,
        alpha=alpha,
        recipe=recipe,
    )
    arguments = {"dynamic": dynamic, "fullgraph": fullgraph}
    if model is None:
        return functools.partial(_compile_any, options=options, arguments=arguments)
    return _compile_any(model, options=options, arguments=arguments)


def compile_with(model: Any, *, options: Options, **arguments: Any) -> Any:
    """:func:`compile` with options that were read before, those of another compiled model for instance."""
    return _compile_any(model, options=options, arguments=arguments)


def _compile_any(model: Any, *, options: Options, arguments: dict[str, Any]) -> Any:
    if isinstance(model, type) and issubclass(model, nn.Module):
        return _compile_class(model, options, arguments)
    if isinstance(model, nn.Module):
        _check_module(model, options)
        fast = copy.copy(model)  # shares every submodule and Parameter, but its call is its own
        _attach(fast, options, arguments)
        return fast
    if callable(model):
        backend = _Backend(options)
        guards = getattr(model, "guard_filter", None)  # of a function that knows what its caller never changes
        compiled = torch.compile(
            model, backend=backend, options={"guard_filter_fn": guards} if guards else None, **arguments
        )
        compiled._qpass_backend = backend  # type: ignore[attr-defined]
        return compiled
    raise OptionError(f"qpass.compile takes an nn.Module, an nn.Module class or a function, not {type(model).__name__}")


def _attach(module: nn.Module, options: Options, arguments: dict[str, Any]) -> None:
    backend = _Backend(options)
    backend.module = weakref.ref(module)
    if trace_rules.check(module.forward):  # torch.nn's own classes: Dynamo would leave their frame to eager execution
        call = external_utils.wrap_inline(module._call_impl)
        module._compiled_call_impl = torch.compile(call, backend=backend, **arguments)
    else:
        module.compile(backend=backend, **arguments)
    object.__setattr__(module, "_qpass_backend", backend)


def _compile_class(cls: type[nn.Module], options: Options, arguments: dict[str, Any]) -> type[nn.Module]:
    """The same class, whose instances compile themselves at the end of the outermost ``__init__``."""
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is cls:
            _check_module(self, options)
            _attach(self, options, arguments)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


def _check_module(module: nn.Module, options: Options) -> None:
    for name, parameter in module.named_parameters():
        if parameter.device.type != "cpu":
            raise UnsupportedError(
                f"{name} is on {parameter.device}; qpass compiles for the CPU: move the model with .to('cpu')"
            )
    if options.stats is not None:
        options.stats.check_model(module)
    options.assignment.check(name for name, child in module.named_modules() if _is_linear(child))


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    embedding = isinstance(module, nn.Embedding)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and not embedding
