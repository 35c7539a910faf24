"""Dense codes: a row is a little-endian stream of bits, and code k lies in its bits k * b to k * b + b - 1.

GPTQ's and compressed-tensors' int32 words, and our artefact's bytes, are the same stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_AT_ONCE = 1 << 18
"""Codes that are worked on at a time, which bounds what the work needs besides its result."""


def dense_bytes(k: int, bits: int) -> int:
    """Length of a row of ``k`` codes."""
    return -(-k * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """``codes`` uint8 [N, K], each below 2**bits -> uint8 [N, ceil(K * bits / 8)]; ``bits`` 1 to 8."""
    n, k = codes.shape
    if bits == 8:
        return codes.contiguous()
    packed = torch.empty(n, dense_bytes(k, bits), dtype=torch.uint8)
    for rows in _blocks(n, k):
        part = codes[rows]
        if 8 % bits == 0:
            per = 8 // bits
            fields = F.pad(part, (0, -k % per)).unflatten(1, (-1, per))
            shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
            packed[rows] = (fields << shifts).sum(-1, dtype=torch.uint8)
        else:  # eight codes are b bytes
            fields = F.pad(part, (0, -k % 8)).unflatten(1, (-1, 8)).long()
            words = (fields << torch.arange(0, 8 * bits, bits)).sum(-1)
            stream = words.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(1)
            packed[rows] = stream[:, : packed.shape[1]]
    return packed


def unpack_bits(packed: Tensor, bits: int, k: int) -> Tensor:
    """The inverse: uint8 [N, at least ceil(K * bits / 8)] -> codes uint8 [N, K]."""
    n = packed.shape[0]
    if bits == 8:
        return packed[:, :k]
    packed = packed[:, : dense_bytes(k, bits)]
    codes = torch.empty(n, k, dtype=torch.uint8)
    for rows in _blocks(n, k):
        part = packed[rows]
        if 8 % bits == 0:
            shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
            fields = part.unsqueeze(-1) >> shifts & (1 << bits) - 1
        else:
            triples = F.pad(part, (0, -part.shape[1] % bits)).unflatten(1, (-1, bits))
            words = F.pad(triples, (0, 8 - bits)).view(torch.int64)
            fields = (words >> torch.arange(0, 8 * bits, bits) & (1 << bits) - 1).to(torch.uint8)
        codes[rows] = fields.flatten(1)[:, :k]
    return codes


def as_bytes(words: Tensor) -> Tensor:
    """Integer words [N, W] as the bytes of their rows [N, W * size]."""
    return words.contiguous().view(torch.uint8)


def _blocks(n: int, k: int) -> list[slice]:
    step = max(1, _AT_ONCE // max(k, 1))
    return [slice(start, start + step) for start in range(0, n, step)]
