"""What a calibration remembers of a linear layer's input: second moments and mean magnitude, shared by its readers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qpass.errors import OptionError

COLUMNS = 640
"""Columns of X^T X at a time: only what lies on and above the diagonal is computed."""


class Moments:
    """Sums over the rows of one input X [rows, K]: of x x^T (fp32, its upper half) and of |x|."""

    def __init__(self, k: int) -> None:
        self.rows = 0
        self._products = torch.zeros(k, k)
        self._magnitudes = torch.zeros(k)

    def add(self, x: Tensor) -> None:
        """``x`` [..., K], any float dtype."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        for start in range(0, x.shape[1], COLUMNS):
            stop = start + COLUMNS
            self._products[start:stop, start:].addmm_(x[:, start:stop].t(), x[:, start:])
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

    def amplitude(self) -> Tensor:
        """Mean of |x|, fp32 [K]."""
        return self._magnitudes / max(1, self.rows)


def siblings(linears: Iterable[tuple[str, nn.Module]], run: Callable[[], object]) -> list[list[str]]:
    """Names of linears that read the same tensor in one run, together; a linear that isn't reached is alone."""
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
    for name, _ in linears:
        inputs = seen.get(name)
        groups.setdefault(tuple(map(id, inputs)) if inputs else name, []).append(name)
    return list(groups.values())


@contextmanager
def watching(first_of_each: Iterable[tuple[str, nn.Module, int]], keep: Callable[[], Tensor | None]) -> Iterator[dict]:
    """Gives the Moments by name, which grow with every run inside; ``keep`` is the batch's mask of real tokens [B, L]."""
    found: dict[str, Moments] = {}
    hooks = []

    def before(name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x, mask = _input(args, kwargs), keep()
            if mask is not None and x.shape[:-1] == mask.shape:
                x = x[mask]
            found[name].add(x)

        return hook

    for name, module, k in first_of_each:
        found[name] = Moments(k)
        hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["input"]


def check_finite(hessian: Tensor, name: str) -> None:
    """Raise OptionError where the layer's inputs weren't finite."""
    if not bool(torch.isfinite(hessian.diagonal()).all()):
        raise OptionError(f"{name}: its inputs hold NaN or infinity in the calibration; run the model in bf16 or fp32")
