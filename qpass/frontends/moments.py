"""What a calibration remembers of a linear layer's input: second moments and mean magnitude, shared by its readers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from qpass.errors import OptionError

COLUMNS = 640
"""Columns of X^T X at a time: only what lies on and above the diagonal is computed."""


class Moments:
    """Sums over the rows of one input x [rows, K], and of the ``original`` o that it stands for in the unquantized model.

    Of x x^T (fp32, its upper half), of (o - x) x^T where an original is given, and of |x|.
    """

    def __init__(self, k: int) -> None:
        self.rows = 0
        self._products = torch.zeros(k, k)
        self._drift: Tensor | None = None
        self._magnitudes = torch.zeros(k)

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """``x`` and ``original`` [..., K], any float dtype."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        for start in range(0, x.shape[1], COLUMNS):
            stop = start + COLUMNS
            self._products[start:stop, start:].addmm_(x[:, start:stop].t(), x[:, start:])
        if original is not None:
            if self._drift is None:
                self._drift = torch.zeros_like(self._products)
            self._drift.addmm_((original.detach().reshape(x.shape).float() - x).t(), x)
        self._magnitudes += x.abs().sum(dim=0)
        self.rows += x.shape[0]

    def hessian(self) -> Tensor:
        """X^T X / rows, fp32 [K, K]; zeros where nothing was seen. The sums are spent: this is asked for once."""
        upper = self._products.triu_()
        whole = upper.div_(max(1, self.rows))
        below = whole.t().clone()
        below.fill_diagonal_(0)
        self._products = torch.empty(0)
        return whole.add_(below)

    def drift(self) -> Tensor | None:
        """(O - X)^T X / rows, fp32 [K, K]; None without originals."""
        return None if self._drift is None else self._drift / max(1, self.rows)

    def amplitude(self) -> Tensor:
        """Mean of |x|, fp32 [K]."""
        return self._magnitudes / max(1, self.rows)


def siblings(linears: Iterable[tuple[str, nn.Module]], run: Callable[[], object]) -> list[list[str]]:
    """Names of linears that read the same tensor in one run, together, in the order in which they run.

    A linear that isn't reached is alone, behind the others.
    """
    seen: dict[str, list[Tensor]] = {}
    linears = list(linears)

    def before(name: str) -> Callable[[nn.Module, tuple, dict], None]:
        return lambda module, args, kwargs: seen.setdefault(name, []).append(_input(args, kwargs))

    hooks = [module.register_forward_pre_hook(before(name), with_kwargs=True) for name, module in linears]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[object, list[str]] = {}
    for name in [*seen, *(name for name, _ in linears if name not in seen)]:
        inputs = seen.get(name)
        groups.setdefault(tuple(map(id, inputs)) if inputs else name, []).append(name)
    return list(groups.values())


def inputs_of(linears: Iterable[tuple[str, nn.Module]], run: Callable[[], object]) -> dict[str, Tensor]:
    """What each of the linears read in one run, [B, L, K].

    Left out are those that ran several times and those whose rows are not the batch's tokens: a router chose them, and
    chooses others elsewhere.
    """
    seen: dict[str, list[Tensor]] = {}

    def before(name: str) -> Callable[[nn.Module, tuple, dict], None]:
        return lambda module, args, kwargs: seen.setdefault(name, []).append(_input(args, kwargs).detach())

    hooks = [module.register_forward_pre_hook(before(name), with_kwargs=True) for name, module in linears]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: xs[0] for name, xs in seen.items() if len(xs) == 1 and xs[0].dim() == 3}


class _Reached(BaseException):
    """What was to be seen has been seen: the rest of the run is not needed."""


class Watch:
    """Sums up what linears read, run after run."""

    def __init__(self, linears: Iterable[tuple[str, nn.Module, int]]) -> None:
        self.moments: dict[str, Moments] = {}
        self._originals: Mapping[str, Tensor] = {}
        self._mask: Tensor | None = None
        self._hooks = []
        for name, module, k in linears:
            self.moments[name] = Moments(k)
            self._hooks.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))

    def run(
        self, run: Callable[[], object], mask: Tensor | None, originals: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """``mask`` is the batch's real tokens, bool [B, L]; ``originals`` what the linears read in the original model.

        The run is cut short once linears that have originals have all been reached.
        """
        self._mask, self._originals, self._awaited = mask, originals, set(self.moments)
        with contextlib.suppress(_Reached):
            run()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x, original = _input(args, kwargs), self._originals.get(name)
            once = original is not None
            if original is not None and original.shape != x.shape:
                original = None
            if self._mask is not None and x.shape[:-1] == self._mask.shape:
                x = x[self._mask]
                original = None if original is None else original[self._mask]
            self.moments[name].add(x, original)
            if once:
                self._awaited.discard(name)
                if not self._awaited:
                    raise _Reached

        return hook

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["input"]


def check_finite(hessian: Tensor, name: str) -> None:
    """Raise OptionError where the layer's inputs weren't finite."""
    if not bool(torch.isfinite(hessian.diagonal()).all()):
        raise OptionError(f"{name}: its inputs hold NaN or infinity in the calibration; run the model in bf16 or fp32")
