"""The store of packed weights: each weight is quantized and packed once, whatever graphs use it and however often they recompile."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from qpass.errors import ReleasedWeightError
from qpass.lowering.given import Given, given_of
from qpass.qweight import QWeight
from qpass.scheme import Format


@dataclass(frozen=True)
class WeightRef:
    """A Parameter as a weight [N, K]; ``transposed`` where the Parameter itself is [K, N] (transformers' Conv1D)."""

    parameter: Tensor
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.parameter.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self) -> Tensor:
        weight = self.parameter.detach()
        return weight.t() if self.transposed else weight


class Packer(Protocol):
    name: str

    def pack(self, weight: QWeight, *, glu: bool) -> tuple[Tensor, ...]: ...


@dataclass
class _Entry:
    alive: tuple[weakref.ref[Tensor], ...]
    versions: tuple[tuple[int, Given | None], ...]  # a Parameter's own count of writes, and what was given for it
    tensors: tuple[Tensor, ...]


@dataclass
class WeightStore:
    """Packed weights by the identity of their Parameters, the format, the lowering and the row order.

    An entry dies with its Parameters; one whose Parameters were written to since is packed anew.
    """

    algorithm: Callable[[Tensor, Format], QWeight]
    is_released: Callable[[Tensor], str | None] = lambda parameter: None
    entries: dict[tuple, _Entry] = field(default_factory=dict)
    packed_count: int = 0  # how often a weight was really packed: tests hold it to once

    def qweight(self, refs: tuple[WeightRef, ...], format: Format) -> QWeight:
        """Quantize the refs' rows, one under the other; those that codes were given for have them already."""
        parts = []
        for ref in refs:
            given = given_of(ref.parameter)
            if given is not None and given.format == format:
                parts.append(given.read())
                continue
            name = self.is_released(ref.parameter)
            if name is not None:
                raise ReleasedWeightError(
                    f"{name}: its full-precision data was released, and this graph needs it in another form than the "
                    "one that was packed; compile with release_weights=False"
                )
            parts.append(self.algorithm(ref.read(), format))
        if len(parts) == 1:
            return parts[0]
        codes, scales, zeros = (torch.cat([getattr(p, f) for p in parts]) for f in ("codes", "scales", "zeros"))
        return QWeight(codes, scales, zeros, format)

    def packed(
        self, refs: tuple[WeightRef, ...], format: Format, packer: Packer, *, glu: bool = False
    ) -> tuple[Tensor, ...]:
        key = (tuple((id(r.parameter), r.transposed) for r in refs), format, packer.name, glu)
        versions = tuple((r.parameter._version, given_of(r.parameter)) for r in refs)
        entry = self.entries.get(key)
        if entry is None or any(ref() is None for ref in entry.alive) or entry.versions != versions:
            tensors = packer.pack(self.qweight(refs, format), glu=glu)
            self.packed_count += 1
            alive = tuple(weakref.ref(r.parameter, lambda _, key=key: self.entries.pop(key, None)) for r in refs)
            entry = _Entry(alive, versions, tensors)
            self.entries[key] = entry
        return entry.tensors

    def bias(self, parameters: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> Tensor:
        """The biases of merged linears one behind the other, fp32 [N]; zeros for a linear without one."""
        parts = [torch.zeros(n) if p is None else p.detach().float() for p, n in zip(parameters, sizes, strict=True)]
        return torch.cat(parts)
