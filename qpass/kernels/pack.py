"""Pack: a quantized weight in the kernels' layout (``cpp/layout.h``), and back. One contiguous uint8 stream."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from qpass.kernels.plan import BLOCK, KernelFormat

_LANES = 16
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_HALF_TINY = 2.0**-14  # the smallest normal float16


def scale_bytes(scales: Tensor) -> int:
    """2 where float16 holds every scale exactly (and as a normal number), else 4."""
    half = scales.half()
    exact = bool((half.float() == scales).all()) and bool((scales.abs() >= _HALF_TINY).all())
    return 2 if exact else 4


def pack(codes: Tensor, scales: Tensor, zeros: Tensor, format: KernelFormat, glu: bool = False) -> Tensor:
    """``codes`` uint8 [N, K], ``scales`` fp32 and ``zeros`` uint8 [N, K/G] -> uint8 [packed bytes].

    ``glu`` marks a weight that stacks N/2 gate rows and N/2 up rows: their blocks of 64 alternate. The activation rule of
    ``format`` doesn't matter here. Padding has code, zero and scale 0.
    """
    n, k = codes.shape
    b, g, kp = format.blocks(n, glu), format.groups(k), format.padded_k(k)
    codes = _blocked(F.pad(codes, (0, kp - k)) if kp > k else codes, b, glu)  # [B, 64, Kp]
    chunk = min(format.group or BLOCK, BLOCK)
    quads = codes.contiguous().view(torch.int32)  # four consecutive inputs each, [B, 64, Kp/4]
    quads = quads.view(b, BLOCK // _LANES, _LANES, g, kp // g // chunk, chunk // 4)  # [B, v, n, G, C, steps]
    quads = quads.permute(0, 3, 4, 1, 5, 2)  # [B, G, C, v, steps, n]
    if format.bits == 4:
        low, high = quads.chunk(2, dim=4)
        quads = torch.bitwise_or(low, high << 4)
    rows = quads.contiguous().view(b, g, -1).view(torch.uint8)  # [B, G, bytes of codes]
    if format.scale_bytes == 2:
        scales = scales.half()
    # [B, G, 64 * size of one]
    tail = [_blocked(t, b, glu).transpose(1, 2).contiguous().view(torch.uint8) for t in (scales, zeros)]
    packed = torch.empty(b, g, sum(t.shape[2] for t in (rows, *tail)), dtype=torch.uint8)
    _advise_huge_pages(packed)
    return torch.cat([rows, *tail], dim=2, out=packed).view(-1)


def unpack(packed: Tensor, n: int, k: int, format: KernelFormat, glu: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`pack`: codes [N, K], scales fp32 [N, K/G], zeros [N, K/G]."""
    b, g, kp = format.blocks(n, glu), format.groups(k), format.padded_k(k)
    sizes = [BLOCK * kp // g * format.bits // 8, BLOCK * format.scale_bytes, BLOCK]
    rows, scales, zeros = (t.contiguous() for t in packed.view(b, g, -1).split(sizes, dim=2))
    chunk = min(format.group or BLOCK, BLOCK)
    quads = rows.view(torch.uint8)
    if format.bits == 4:
        quads = quads.view(b, g, kp // g // chunk, BLOCK // _LANES, chunk // 8, _LANES * 4)
        quads = torch.cat([quads & 15, quads >> 4], dim=4)
    quads = quads.reshape(b, g, kp // g // chunk, BLOCK // _LANES, chunk // 4, _LANES, 4)
    codes = quads.permute(0, 3, 5, 1, 2, 4, 6).reshape(b, BLOCK, kp)
    values = scales.view(torch.float16 if format.scale_bytes == 2 else torch.float32).float()
    parts = (codes, values.transpose(1, 2), zeros.transpose(1, 2))
    full = [_unblocked(t, n, glu) for t in parts]
    return full[0][:, :k].contiguous(), full[1], full[2]


def _advise_huge_pages(tensor: Tensor) -> None:
    """Ask for 2 MB pages before the memory is touched: streaming a weight then misses the TLB less often. Best effort."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    begin = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    length = (tensor.data_ptr() + tensor.nbytes - begin) // _HUGE_PAGE * _HUGE_PAGE
    if madvise is not None and length > 0:
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_HUGEPAGE)


def _blocked(rows: Tensor, blocks: int, glu: bool) -> Tensor:
    """[N, X] -> [B, 64, X], padded with zeros; for a gated pair block 2i is of the first half, 2i + 1 of the second."""
    if not glu:
        n = rows.shape[0]
        return F.pad(rows, (0, 0, 0, blocks * BLOCK - n)).view(blocks, BLOCK, -1)
    halves = [_blocked(half, blocks // 2, False) for half in rows.chunk(2)]
    return torch.stack(halves, dim=1).view(blocks, BLOCK, -1)


def _unblocked(blocks: Tensor, n: int, glu: bool) -> Tensor:
    if not glu:
        return blocks.reshape(blocks.shape[0] * BLOCK, -1)[:n].contiguous()
    return torch.cat([_unblocked(blocks[half::2], n // 2, False) for half in (0, 1)])
