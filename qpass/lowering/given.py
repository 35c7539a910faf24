"""Weights whose codes somebody else found: GPTQ, AWQ, another program's checkpoint, our own artefact.

They hang on the Parameter, not on the graph, so that every pass and every lowering treats them like codes of our own.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from qpass.errors import OptionError
from qpass.qweight import QWeight
from qpass.scheme import Activation, Format, Scheme

SAMPLED_ROWS = 16
"""Of a weight, to see whether its values changed; few enough that a mapped file's pages stay unread."""


@dataclass(frozen=True, eq=False)
class Given:
    """The codes of one weight, logical [N, K], and what its input needs before it meets them.

    format      of the codes
    read        finds them: from memory, or from a mapped file whenever they are packed
    divisor     fp32 [K]: the codes multiply x / divisor (AWQ, smoothing); None: x itself
    order       int64 [K], a permutation: column j of the codes multiplies x[..., order[j]] (GPTQ's act-order)
    activation  how activations meet the codes; None: as the scheme that the user chose says
    source      who found them, for explain
    values      a hash of the weight's values that they were found for; None: the weight has no others
    origin      names the stored bytes that ``read`` reads and how it reads them; None: no file's
    """

    format: Format
    read: Callable[[], QWeight]
    divisor: Tensor | None = None
    order: Tensor | None = None
    activation: Activation | None = None
    source: str = "given"
    values: int | None = None
    origin: str | None = None

    @classmethod
    def of(
        cls,
        weight: QWeight,
        *,
        divisor: Tensor | None = None,
        order: Tensor | None = None,
        activation: Activation | None = None,
        source: str = "given",
    ) -> Given:
        """Codes that are in memory. Raises ValueError for a divisor or an order that doesn't fit them."""
        _check_divisor(divisor, weight.k)
        _check_order(order, weight.k)
        return cls(weight.format, lambda: weight, divisor, order, activation, source)

    def scheme(self, chosen: Scheme) -> Scheme:
        """These codes, with the activations of the scheme that the user chose for the module."""
        return Scheme.of(self.format, self.activation or chosen.activation)

    def check(self, parameter: Tensor, name: str = "") -> None:
        """Raise OptionError where the weight's values are others by now: a merged adapter, a step of training."""
        if self.values is not None and hash_of(parameter) not in (self.values, None):
            raise OptionError(
                f"{name or f'a weight {list(parameter.shape)}'}: its values changed since {self.source} found codes for them; "
                "merge and train first, then quantize"
            )

    @cached_property
    def input_key(self) -> str:
        """Equal for weights that want their input divided and ordered alike: they can share it."""
        return "|".join(_digest(tensor) for tensor in (self.divisor, self.order))


def hash_of(parameter: Tensor) -> int | None:
    """Of sixteen rows: a merged adapter or a step of training changes all. None for a weight without values (a released one).

    Writes through ``.data``, as PEFT merges, leave no trace in a tensor's own count of writes.
    """
    if type(parameter) is not nn.Parameter:
        return None
    rows = parameter.detach()[:: -(-parameter.shape[0] // SAMPLED_ROWS) or 1]
    return int(torch.hash_tensor(rows).item())


def give(parameter: Tensor, given: Given) -> None:
    """Let graphs that are compiled from now on use ``given`` in the place of ``parameter``'s values."""
    key = id(parameter)
    _given[key] = (weakref.ref(parameter, lambda _: _given.pop(key, None)), given)


def take_back(parameter: Tensor) -> None:
    """Forget what :func:`give` gave; the Parameter's own values count again."""
    _given.pop(id(parameter), None)


def given_of(parameter: Tensor) -> Given | None:
    found = _given.get(id(parameter))
    return found[1] if found is not None and found[0]() is parameter else None


_given: dict[int, tuple[weakref.ref[Tensor], Given]] = {}


def _check_divisor(divisor: Tensor | None, k: int) -> None:
    if divisor is None:
        return
    if divisor.dtype != torch.float32 or tuple(divisor.shape) != (k,):
        raise ValueError(f"divisor must be float32 [{k}], not {divisor.dtype} {list(divisor.shape)}")
    if not bool((torch.isfinite(divisor) & (divisor > 0)).all()):
        raise ValueError("divisor must be positive and finite")


def _check_order(order: Tensor | None, k: int) -> None:
    if order is None:
        return
    if order.dtype != torch.int64 or tuple(order.shape) != (k,):
        raise ValueError(f"order must be int64 [{k}], not {order.dtype} {list(order.shape)}")
    if not torch.equal(order.sort().values, torch.arange(k)):
        raise ValueError(f"order must be a permutation of 0..{k - 1}")


def _digest(tensor: Tensor | None) -> str:
    return "" if tensor is None else hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
