"""Pack: a quantized weight in the kernels' layout (``cpp/layout.h``), and back. One contiguous uint8 stream."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qpass.kernels.format import BLOCK, KernelFormat
from qpass.qweight import multiples

_LANES = 16
_VECTORS = BLOCK // _LANES
_THIRDS = ((2, 3, 6, 7), (0, 1, 4, 5))  # where the third bits of two rows of pairs lie
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_HALF_TINY = 2.0**-14  # the smallest normal float16


def scale_bytes(scales: Tensor) -> int:
    """2 where float16 holds every scale exactly (and as a normal number), else 4."""
    half = scales.half()
    exact = bool((half.float() == scales).all()) and bool((scales.abs() >= _HALF_TINY).all())
    return 2 if exact else 4


def pack(codes: Tensor, scales: Tensor, zeros: Tensor, format: KernelFormat, glu: bool = False) -> Tensor:
    """``codes`` uint8 [N, K], ``scales`` fp32 and ``zeros`` uint8 or fp32 [N, K/G] -> uint8 [packed bytes].

    ``glu`` marks a weight that stacks N/2 gate rows and N/2 up rows: their blocks of 64 alternate. The activation rule of
    ``format`` doesn't matter here; its zeros have the type of ``zeros``. Padding has code, zero and scale 0. Raises
    ValueError for a format of integer scales where ``scales`` are none, or their products no signed bytes.
    """
    n, k = codes.shape
    b, g, kp = format.blocks(n, glu), format.groups(k), format.padded_k(k)
    g = 1 if format.integer_scales else g
    codes = _blocked(F.pad(codes, (0, kp - k)) if kp > k else codes, b, glu)  # [B, 64, Kp]
    quads = codes.contiguous().view(torch.int32)  # four consecutive inputs each, [B, 64, Kp/4]
    quads = quads.view(b, _VECTORS, _LANES, g, kp // g // format.chunk, format.chunk // 4)  # [B, v, n, G, C, steps]
    quads = _joined(quads.permute(0, 3, 4, 1, 5, 2), format.bits)  # [B, G, C, v, steps, n]
    rows = quads.contiguous().view(b, g, -1).view(torch.uint8)  # [B, G, bytes of codes]
    if format.integer_scales:
        steps, scales = _steps(scales, zeros, format, kp)
        steps = _blocked(steps, b, glu).transpose(1, 2)  # [B, C, 64]
        rows = torch.cat([rows.view(b, steps.shape[1], -1), steps], dim=2).view(b, 1, -1)
        zeros = torch.full((n, 1), 128, dtype=torch.uint8)
    elif format.scale_bytes == 2:
        scales = scales.half()
    # [B, G, 64 * size of one]
    tail = [_blocked(t, b, glu).transpose(1, 2).contiguous().view(torch.uint8) for t in (scales, zeros)]
    packed = empty_packed((b, g, sum(t.shape[2] for t in (rows, *tail))))
    return torch.cat([rows, *tail], dim=2, out=packed).view(-1)


def _steps(scales: Tensor, zeros: Tensor, format: KernelFormat, kp: int) -> tuple[Tensor, Tensor]:
    """What a chunk's last line holds of each output, uint8 [N, Kp/chunk], and the outputs' own scales fp32 [N, 1]."""
    times, own = multiples(scales, zeros, format.bits)
    assert format.group is not None
    chunk = (torch.arange(kp // format.chunk) * format.chunk // format.group).clamp(max=scales.shape[1] - 1)
    return (times | zeros << 4)[:, chunk], own


def unpack(packed: Tensor, n: int, k: int, format: KernelFormat, glu: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`pack`: codes [N, K], scales fp32 [N, K/G], zeros [N, K/G]."""
    b, g, kp = format.blocks(n, glu), format.groups(k), format.padded_k(k)
    if format.integer_scales:
        return _unpack_integer(packed, n, k, format, glu)
    sizes = [BLOCK * kp // g * format.bits // 8, BLOCK * format.scale_bytes, BLOCK * format.zero_bytes]
    rows, scales, zeros = (t.contiguous() for t in packed.view(b, g, -1).split(sizes, dim=2))
    quads = _split(rows.view(torch.int32).view(b, g, kp // g // format.chunk, -1, _LANES), format)
    codes = quads.permute(0, 3, 5, 1, 2, 4).contiguous().view(torch.uint8).view(b, BLOCK, kp)
    values = scales.view(torch.float16 if format.scale_bytes == 2 else torch.float32).float()
    zeros = zeros.view(torch.float32) if format.zero_bytes == 4 else zeros
    parts = (codes, values.transpose(1, 2), zeros.transpose(1, 2))
    full = [_unblocked(t, n, glu) for t in parts]
    return full[0][:, :k].contiguous(), full[1], full[2]


def _unpack_integer(packed: Tensor, n: int, k: int, format: KernelFormat, glu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`unpack`, of a format with integer scales."""
    b, kp = format.blocks(n, glu), format.padded_k(k)
    chunks = kp // format.chunk
    codes_of = BLOCK * format.chunk * format.bits // 8
    body, own, _ = packed.view(b, -1).split([chunks * (codes_of + BLOCK), 4 * BLOCK, BLOCK], dim=1)
    rows, steps = body.reshape(b, chunks, -1).split([codes_of, BLOCK], dim=2)
    quads = _split(rows.contiguous().view(torch.int32).view(b, 1, chunks, -1, _LANES), format)
    codes = quads.permute(0, 3, 5, 1, 2, 4).contiguous().view(torch.uint8).view(b, BLOCK, kp)
    assert format.group is not None
    first = -(-torch.arange(format.groups(k)) * format.group // format.chunk)  # each group's first chunk
    steps = steps.transpose(1, 2)[:, :, first]
    own = own.contiguous().view(torch.float32).view(b, BLOCK, 1)
    full = [_unblocked(t, n, glu) for t in (codes, (steps & 15).float() * own, steps >> 4)]
    return full[0][:, :k].contiguous(), full[1], full[2]


def _joined(quads: Tensor, bits: int) -> Tensor:
    """K4-steps as the layout's rows: int32 [..., v, steps, 16], a code in each byte -> [..., rows, 16] of any leading shape."""
    if bits == 8:
        return quads
    if bits == 4:
        low, high = quads.chunk(2, dim=-2)
        return low | high << 4
    steps = quads.unflatten(-2, (-1, 4)).flatten(-4, -3)  # [..., v * code rows, 4, 16]
    pairs = _or(steps & 0x03030303, (0, 2, 4, 6))
    if bits == 2:
        return pairs
    thirds = (steps >> 2 & 0x01010101).unflatten(-3, (-1, 2))
    first, second = (_or(thirds[..., half, :, :], places) for half, places in enumerate(_THIRDS))
    return torch.cat([pairs.unflatten(-2, (-1, 2)), (first | second).unsqueeze(-2)], dim=-2)


def _split(rows: Tensor, format: KernelFormat) -> Tensor:
    """The inverse of :func:`_joined`: int32 [B, G, C, rows, 16] -> [B, G, C, v, steps, 16]."""
    if format.bits == 8:
        return rows.unflatten(-2, (_VECTORS, -1))
    if format.bits == 4:
        rows = rows.unflatten(-2, (_VECTORS, -1))
        return torch.cat([rows & 0x0F0F0F0F, rows >> 4 & 0x0F0F0F0F], dim=-2)
    if format.bits == 3:
        triples = rows.unflatten(-2, (-1, 3))
        rows, third = triples[..., :2, :].flatten(-3, -2), triples[..., 2, :]
    steps = torch.stack([rows >> place & 0x03030303 for place in (0, 2, 4, 6)], dim=-2)  # [..., v * code rows, 4, 16]
    if format.bits == 3:
        halves = [torch.stack([third >> p & 0x01010101 for p in places], dim=-2) for places in _THIRDS]
        steps = steps | torch.stack(halves, dim=-3).flatten(-4, -3) << 2
    return steps.unflatten(-3, (_VECTORS, -1)).flatten(-3, -2)


def _or(steps: Tensor, places: tuple[int, ...]) -> Tensor:
    """[..., 4, 16] -> [..., 16]: step i moved up to bit ``places[i]`` of its byte."""
    a, b, c, d = (steps[..., i, :] << place for i, place in enumerate(places))
    return a | b | c | d


def empty_packed(shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> Tensor:
    """Memory for a packed weight, in large pages where the system has them."""
    tensor = torch.empty(shape, dtype=dtype)
    _advise_huge_pages(tensor)
    return tensor


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
