"""ggml's block formats as codes, scales and zeros: ``w = (code - zero) * scale`` with the very numbers of the block.

Where a block stores ``d * code + m``, the zero is -m / d in fp32: w differs from llama.cpp's by the rounding of that division.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.scheme import Format

Split = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""uint8 [B, bytes of a block] -> codes uint8 [B, length], scales fp32 [B, groups], zeros [B, groups]."""


@dataclass(frozen=True)
class Blocks:
    """``length`` weights in ``size`` bytes. ``split`` is None for what our formats can't hold."""

    name: str
    length: int
    size: int
    format: Format
    split: Split | None


def _half(raw: Tensor) -> Tensor:
    """Two bytes as fp16 -> fp32."""
    return raw.contiguous().view(torch.float16).float()


def _planes(raw: Tensor, shifts: tuple[int, ...], mask: int, width: int) -> Tensor:
    """Each ``width`` bytes give one run of ``width`` fields a shift: [B, bytes] -> [B, bytes * shifts]."""
    runs = raw.unflatten(1, (-1, 1, width)) >> torch.tensor(shifts, dtype=torch.uint8).view(-1, 1)
    return (runs & mask).flatten(1)


def _nibbles(raw: Tensor) -> Tensor:
    return _planes(raw, (0, 4), 15, raw.shape[1])


def _fifth_bits(raw: Tensor) -> Tensor:
    """Four bytes, bit i of them for weight i -> [B, 32]."""
    return (raw.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)


def _constant(scales: Tensor, zero: int) -> Tensor:
    return torch.full_like(scales, zero, dtype=torch.uint8)


def _affine(codes: Tensor, d: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``d * code + m`` [B, G]. Where d is 0 every weight is m: codes 0, zero -1 and scale m say so."""
    flat = d == 0
    length = codes.shape[1] // d.shape[1]
    codes = torch.where(flat.repeat_interleave(length, dim=1), 0, codes).to(torch.uint8)
    zeros = torch.where(flat, -1.0, -m / torch.where(flat, 1.0, d))
    return codes, torch.where(flat, m, d), zeros


def _q4_0(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = _half(raw[:, :2])
    return _nibbles(raw[:, 2:]), d, _constant(d, 8)


def _q4_1(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _affine(_nibbles(raw[:, 4:]), _half(raw[:, :2]), _half(raw[:, 2:4]))


def _q5_0(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = _half(raw[:, :2])
    return (
        (_nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6]) << 4) + 112,
        d,
        _constant(d, 128),
    )  # 16 is the zero of five bits


def _q5_1(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = _nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8]) << 4
    return _affine(codes, _half(raw[:, :2]), _half(raw[:, 2:4]))


def _q8_0(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = _half(raw[:, :2])
    return raw[:, 2:] ^ 128, d, _constant(d, 128)


def _q2_k(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d, least = _half(raw[:, 80:82]), _half(raw[:, 82:84])
    codes = _planes(raw[:, 16:80], (0, 2, 4, 6), 3, 32)
    return _affine(codes, d * (raw[:, :16] & 15), -least * (raw[:, :16] >> 4))


def _q3_k(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    high, low, packed = raw[:, :32], raw[:, 32:96], raw[:, 96:108]
    four = _planes(packed[:, :8], (0, 4), 15, 8)
    two = _planes(packed[:, 8:], (0, 2, 4, 6), 3, 4)
    scales = _half(raw[:, 108:110]) * ((four | two << 4).float() - 32)
    third = _planes(high, tuple(range(8)), 1, 32)
    return _planes(low, (0, 2, 4, 6), 3, 32) | third << 2, scales, _constant(scales, 4)


def _six_bit_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The twelve bytes of Q4_K and Q5_K: eight scales and eight minima of six bits."""
    d, m, both = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    scales = torch.cat([d & 63, (both & 15) | (d >> 2 & 48)], dim=1)
    least = torch.cat([m & 63, both >> 4 | (m >> 2 & 48)], dim=1)
    return scales.float(), least.float()


def _q4_k(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, least = _six_bit_scales(raw[:, 4:16])
    return _affine(_planes(raw[:, 16:], (0, 4), 15, 32), _half(raw[:, :2]) * scales, -_half(raw[:, 2:4]) * least)


def _q5_k(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, least = _six_bit_scales(raw[:, 4:16])
    codes = _planes(raw[:, 48:], (0, 4), 15, 32) | _planes(raw[:, 16:48], tuple(range(8)), 1, 32) << 4
    return _affine(codes, _half(raw[:, :2]) * scales, -_half(raw[:, 2:4]) * least)


def _q6_k(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = _planes(raw[:, :128], (0, 4), 15, 64) | _planes(raw[:, 128:192], (0, 2, 4, 6), 3, 32) << 4
    scales = _half(raw[:, 208:210]) * raw[:, 192:208].contiguous().view(torch.int8)
    return codes + 96, scales, _constant(scales, 128)  # 32 is the zero of six bits


BLOCKS: dict[int, Blocks] = {
    2: Blocks("Q4_0", 32, 18, Format(4, 32, True), _q4_0),
    3: Blocks("Q4_1", 32, 20, Format(4, 32, False, True), _q4_1),
    6: Blocks("Q5_0", 32, 22, Format(8, 32, True), _q5_0),
    7: Blocks("Q5_1", 32, 24, Format(8, 32, False, True), _q5_1),
    8: Blocks("Q8_0", 32, 34, Format(8, 32, True), _q8_0),
    10: Blocks("Q2_K", 256, 84, Format(2, 16, False, True), _q2_k),
    11: Blocks("Q3_K", 256, 110, Format(3, 16, True), _q3_k),
    12: Blocks("Q4_K", 256, 144, Format(4, 32, False, True), _q4_k),
    13: Blocks("Q5_K", 256, 176, Format(8, 32, False, True), _q5_k),
    14: Blocks("Q6_K", 256, 210, Format(8, 16, True), _q6_k),
    16: Blocks("IQ2_XXS", 256, 66, Format(2, 16), None),
    17: Blocks("IQ2_XS", 256, 74, Format(2, 16), None),
    18: Blocks("IQ3_XXS", 256, 98, Format(3, 16), None),
    19: Blocks("IQ1_S", 256, 50, Format(2, 16), None),
    20: Blocks("IQ4_NL", 32, 18, Format(4, 32), None),
    21: Blocks("IQ3_S", 256, 110, Format(3, 16), None),
    22: Blocks("IQ2_S", 256, 82, Format(2, 16), None),
    23: Blocks("IQ4_XS", 256, 136, Format(4, 32), None),
    29: Blocks("IQ1_M", 256, 56, Format(2, 16), None),
}
"""By ggml's type number. The IQ formats look their values up in tables, which no scale and zero can say."""
