"""QWeight: the numbers of one quantized weight matrix, independent of any machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.scheme import Format


@dataclass(frozen=True)
class QWeight:
    """``w = (codes - zeros) * scales``, logical shape [N, K].

    codes   uint8  [N, K]    unsigned, at most ``format.max_code``
    scales  fp32   [N, K/G]  G inputs share one; K/G rounds up, the last group may be short; G = K per channel
    zeros   uint8  [N, K/G]  in code units; fp32 where the format says float_zeros
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    format: Format

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or self.codes.dtype != torch.uint8:
            raise ValueError(f"codes must be uint8 [N, K], not {self.codes.dtype} {list(self.codes.shape)}")
        expected = (self.n, self.format.groups_of(self.k))
        for name, tensor, dtype in (
            ("scales", self.scales, torch.float32),
            ("zeros", self.zeros, zero_dtype(self.format)),
        ):
            if tensor.dtype != dtype or tuple(tensor.shape) != expected:
                raise ValueError(f"{name} must be {dtype} {list(expected)}, not {tensor.dtype} {list(tensor.shape)}")

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    @property
    def group(self) -> int:
        """Inputs per scale; K for a per-channel format."""
        return self.k if self.format.group is None else self.format.group

    def dequantize(self) -> Tensor:
        """The weights that the codes stand for, fp32 [N, K]: the reference for every kernel."""
        scales, zeros = (t.repeat_interleave(self.group, dim=1)[:, : self.k] for t in (self.scales, self.zeros))
        return (self.codes.float() - zeros.float()) * scales


MOST_MULTIPLE, SIGNED_BYTE = 15, 127
"""Of integer scales: the largest multiple, and the largest product of one with a code less its zero."""


def row_scale(least: Tensor) -> Tensor:
    """The next number up from ``least`` whose products with multiples are exact in fp32: of 12 bits; 1 for none."""
    mantissa, exponent = torch.frexp(least)
    up = torch.ldexp((mantissa * 4096).ceil() / 4096, exponent)
    return torch.where(up > torch.finfo(torch.float32).tiny, up, torch.ones_like(up))


def multiples(scales: Tensor, zeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integer ``scales`` [N, K/G] as whole multiples, uint8 [N, K/G], of a scale a row, fp32 [N, 1].

    Raises ValueError where they are none, or where a code less its zero, times the multiple, is no signed byte.
    """
    most, own = scales.amax(dim=1, keepdim=True), torch.zeros(scales.shape[0], 1)
    for multiple in range(1, MOST_MULTIPLE + 1):
        candidate = most / multiple
        whole = (scales / candidate).round()
        fits = ((whole * candidate == scales) & (whole >= 1)).all(dim=1, keepdim=True)
        own = torch.where((own == 0) & fits, candidate, own)
    if not bool((own > 0).all()):
        raise ValueError(f"a row's scales are no whole multiples, 1 to {MOST_MULTIPLE}, of one positive number")
    times = (scales / own).round()
    top = (1 << bits) - 1
    if zeros.is_floating_point() or int(zeros.max()) > top:
        raise ValueError(f"zeros of integer scales are codes, at most {top}")
    if bool((torch.maximum(zeros.float(), top - zeros.float()) * times > SIGNED_BYTE).any()):
        raise ValueError("a code less its zero, times the multiple of its integer scale, can exceed a signed byte")
    return times.to(torch.uint8), own


def zero_dtype(format: Format) -> torch.dtype:
    return torch.float32 if format.float_zeros else torch.uint8
