"""Int8 activations: what a token's row becomes before it meets int8, int4, int3 or int2 codes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

ROTATION = 64
"""Channels that are rotated together."""


def quantize_activation(x: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric int8: values [M, K] as fp32 integers in -127..127 and scales [M, K/G].

    Each token (``group`` None: K inputs) or each group of a token is scaled by its own largest magnitude, so a row's
    result depends on no other row. A group of zeros has scale 1.
    """
    m, k = x.shape
    length = k if group is None else group
    padded = torch.nn.functional.pad(x.float(), (0, -k % length)).view(m, -1, length)
    amax = padded.abs().amax(dim=2)
    amax = torch.where(amax > 0, amax, torch.full_like(amax, 127.0))
    inverse = torch.full_like(amax, 127.0) / amax  # `127.0 / amax` would be a rounded reciprocal times 127
    values = (padded * inverse[..., None]).round().clamp_(-127, 127)
    return values.view(m, -1)[:, :k], amax / 127.0


def quantize_by_scale(x: Tensor, scale: float, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Static int8 of ``x - shift``: values [M, K] and scales [M, 1], all of them ``scale``; what lies beyond is clamped.

    A shift is what a zero point is for: ``x ~ scale * values + shift``, and ``shift`` times a weight's row sums is a bias.
    """
    scales = x.new_full((x.shape[0], 1), scale, dtype=torch.float32)
    rows = x.float() - shift if shift else x.float()
    values = (rows * (torch.ones_like(scales) / scales)).round().clamp_(-127, 127)
    return values, scales


def rotated(x: Tensor) -> Tensor:
    """``x [..., K]``, 64 channels at a time times the orthonormal Hadamard matrix (QuaRot, arXiv 2404.00456); fp32.

    What is large in one channel becomes a little in 64. A product stays what it is where weights are rotated alike. Its own inverse.
    """
    return (x.float().unflatten(-1, (-1, ROTATION)) @ _hadamard().to(x.device)).flatten(-2)


def can_be_rotated(k: int) -> bool:
    """Whether the kernels rotate K inputs: whole blocks, and a row that fits their stack."""
    return k % ROTATION == 0 and k <= 1 << 15


@functools.cache
def _hadamard() -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < ROTATION:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / ROTATION**0.5
