"""The store of packed weights: each weight is quantized and packed once, whatever graphs use it and however often they recompile."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from qpass.errors import ReleasedWeightError
from qpass.lowering import shelf
from qpass.lowering.given import Given, given_of, hash_of
from qpass.qactivation import rotated
from qpass.qweight import QWeight, multiples, row_scale
from qpass.scheme import Format

ROWS = 4096
"""Scaled rows at a time, as many as are quantized at a time: a head's fp32 copy would not fit beside it."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """What smoothing makes of a weight before it is quantized: ``w * columns * rows[:, None]``; fp32 [K] and [N], or None.

    ``rotate``: and its columns rotated, for inputs that are.
    """

    columns: Tensor | None = None
    rows: Tensor | None = None
    rotate: bool = False

    @cached_property
    def key(self) -> str:
        """Equal for equal numbers."""
        parts = (b"" if t is None else t.contiguous().numpy().tobytes() for t in (self.columns, self.rows))
        return "|".join([*(hashlib.sha256(part).hexdigest() for part in parts), str(self.rotate)])

    def apply(self, weight: Tensor, start: int) -> Tensor:
        """The rows of ``weight`` from ``start`` on, scaled, fp32."""
        weight = weight.float()
        if self.columns is not None:
            weight = weight * self.columns
        if self.rows is not None:
            weight = weight * self.rows[start : start + weight.shape[0], None]
        return rotated(weight) if self.rotate else weight


@dataclass(frozen=True)
class WeightRef:
    """A Parameter as a weight [N, K]; ``transposed`` where the Parameter itself is [K, N] (transformers' Conv1D)."""

    parameter: Tensor
    transposed: bool = False
    scaling: Scaling | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.parameter.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self) -> Tensor:
        weight = self.parameter.detach()
        return weight.t() if self.transposed else weight


class Packer(Protocol):
    name: str
    portable: bool  # what it packs is plain bytes of a layout of ours, which another process can use

    def pack(self, weight: QWeight, *, glu: bool) -> tuple[Tensor, ...]: ...


@dataclass
class _Entry:
    alive: tuple[weakref.ref[Tensor], ...]
    versions: tuple[tuple[int, Given | None], ...]  # a Parameter's own count of writes, and what was given for it
    values: tuple[int | None, ...]  # hashes
    tensors: tuple[Tensor, ...]

    def serves(self, versions: tuple[tuple[int, Given | None], ...], values: tuple[int | None, ...]) -> bool:
        """Whether these are its Parameters as they were; one that was released since has no values to compare."""
        same = all(now in (None, then) for now, then in zip(values, self.values, strict=True))
        return same and self.versions == versions and all(ref() is not None for ref in self.alive)


@dataclass
class WeightStore:
    """Packed weights by the identity of their Parameters, their smoothing, the format, the lowering and the row order.

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
                given.check(ref.parameter)
                parts.append(_scaled_codes(given.read(), ref.scaling))
                continue
            name = self.is_released(ref.parameter)
            if name is not None:
                raise ReleasedWeightError(
                    f"{name}: its full-precision data was released, and this graph needs it in another form than the "
                    "one that was packed; compile with release_weights=False"
                )
            parts += self._quantized(ref, format)
        return _stacked(parts)

    def values(self, ref: WeightRef) -> Tensor:
        """What the weight is worth, [N, K]: its own values, or those of the codes that were given for it."""
        given = given_of(ref.parameter)
        if given is not None:
            given.check(ref.parameter)
            return given.read().dequantize()
        name = self.is_released(ref.parameter)
        if name is not None:
            raise ReleasedWeightError(
                f"{name}: its full-precision data was released, and smoothing needs it; compile with release_weights=False"
            )
        return ref.read()

    def _quantized(self, ref: WeightRef, format: Format) -> list[QWeight]:
        weight, scaling = ref.read(), ref.scaling
        if scaling is None:
            return [self.algorithm(weight, format)]
        starts = range(0, ref.shape[0], ROWS)
        return [self.algorithm(scaling.apply(weight[start : start + ROWS], start), format) for start in starts]

    def packed(
        self, refs: tuple[WeightRef, ...], format: Format, packer: Packer, *, glu: bool = False
    ) -> tuple[Tensor, ...]:
        weights = tuple((id(r.parameter), r.transposed, r.scaling and r.scaling.key) for r in refs)

        def pack() -> tuple[Tensor, ...]:
            self.packed_count += 1
            return packer.pack(self.qweight(refs, format), glu=glu)

        def stored() -> tuple[Tensor, ...]:
            origins = [_origin(ref, format) for ref in refs]
            if None in origins or not packer.portable:
                return pack()
            size = sum(n * k for n, k in (ref.shape for ref in refs)) * format.bits // 8
            return shelf.obtain(shelf.name_of(origins, str(format), packer.name, glu), size, pack)

        return self._kept((weights, format, packer.name, glu), refs, stored)

    def columns(self, refs: tuple[WeightRef, ...], index: Tensor) -> Tensor:
        """Some columns of the refs' weights, as rows side by side, in their own dtype: [len(index), N].

        Their smoothing scales the rows of the weights only: these columns meet inputs as they are.
        """
        weights = tuple((id(r.parameter), r.transposed, r.scaling and r.scaling.key) for r in refs)

        def make() -> tuple[Tensor, ...]:
            parts = []
            for ref in refs:
                part, rows = self.values(ref)[:, index], ref.scaling and ref.scaling.rows
                parts.append(part if rows is None else (part * rows[:, None]).to(part.dtype))
            return (torch.cat(parts).t().contiguous(),)

        return self._kept((weights, "columns", tuple(index.tolist())), refs, make)[0]

    def sums(self, refs: tuple[WeightRef, ...], format: Format) -> Tensor:
        """What an input of ones throughout gives, fp32 [N], by the codes."""
        weights = tuple((id(r.parameter), r.transposed, r.scaling and r.scaling.key) for r in refs)

        def make() -> tuple[Tensor, ...]:
            ones = torch.ones(refs[0].shape[1])
            ones = rotated(ones) if refs[0].scaling is not None and refs[0].scaling.rotate else ones
            return (self.qweight(refs, format).dequantize() @ ones,)

        return self._kept((weights, format, "sums"), refs, make)[0]

    def _kept(
        self, key: tuple, refs: tuple[WeightRef, ...], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        versions = tuple((r.parameter._version, given_of(r.parameter)) for r in refs)
        values = tuple(hash_of(r.parameter) for r in refs)
        entry = self.entries.get(key)
        if entry is None or not entry.serves(versions, values):
            tensors = make()
            alive = tuple(weakref.ref(r.parameter, lambda _, key=key: self.entries.pop(key, None)) for r in refs)
            entry = _Entry(alive, versions, values, tensors)
            self.entries[key] = entry
        return entry.tensors

    def bias(self, parameters: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> Tensor:
        """The biases of merged linears one behind the other, fp32 [N]; zeros for a linear without one."""
        parts = [torch.zeros(n) if p is None else p.detach().float() for p, n in zip(parameters, sizes, strict=True)]
        return torch.cat(parts)


def _origin(ref: WeightRef, format: Format) -> list[str] | None:
    """What a packed weight comes from, where that is a stored checkpoint."""
    given = given_of(ref.parameter)
    if given is None or given.origin is None or given.format != format or given.values is not None:
        return None
    return [given.origin, ref.scaling.key if ref.scaling is not None else ""]


def _stacked(parts: list[QWeight]) -> QWeight:
    if len(parts) == 1:
        return parts[0]
    codes, scales, zeros = (torch.cat([getattr(p, f) for p in parts]) for f in ("codes", "scales", "zeros"))
    return QWeight(codes, scales, zeros, parts[0].format)


def _scaled_codes(weight: QWeight, scaling: Scaling | None) -> QWeight:
    """Codes that are there already, their rows scaled: only the scales change.

    Scales that float16 held are rounded to it again, a relative 2^-11, so that they pack as small as before.
    """
    if scaling is None or scaling.rows is None:
        return weight
    if weight.format.integer_scales:
        times, own = multiples(weight.scales, weight.zeros, weight.format.bits)
        return replace(weight, scales=times * row_scale(own * scaling.rows[:, None]))
    scales = weight.scales * scaling.rows[:, None]
    half = scales.half().float()
    fits = torch.equal(weight.scales.half().float(), weight.scales) and bool(
        (torch.isfinite(half) & (half >= 2.0**-14)).all()
    )
    return QWeight(weight.codes, half if fits else scales, weight.zeros, weight.format)
