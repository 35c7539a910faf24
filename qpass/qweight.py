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


def zero_dtype(format: Format) -> torch.dtype:
    return torch.float32 if format.float_zeros else torch.uint8
