"""The packed weight: there and back, and the bytes where the layout says."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FORMATS, Weight, name_of

from qpass.algorithms.rtn import rtn
from qpass.kernels.format import KernelFormat
from qpass.kernels.pack import pack, scale_bytes, unpack
from qpass.scheme import Format


@pytest.mark.parametrize("format", [f for f in FORMATS if f.rule == "a16"], ids=name_of)
def test_round_trip(format: KernelFormat) -> None:
    for n, k in ((1, 1), (64, 128), (65, 129), (130, 391), (200, 20)):
        for glu in (False, True):
            if glu and n % 2:
                continue
            weight = Weight.random(n, k, format, glu)
            packed = weight.packed()
            assert packed.numel() == format.packed_bytes(n, k, glu)
            assert packed.data_ptr() % 64 == 0
            codes, scales, zeros = unpack(packed, n, k, format, glu)
            assert torch.equal(codes, weight.codes)
            assert torch.equal(scales, weight.scales)
            assert torch.equal(zeros, weight.zeros)


def placed(format: KernelFormat, n: int, k: int, code: int) -> dict[int, int]:
    """The bytes of a packed [64, 128] weight that one code is found in."""
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    codes[n, k] = code
    groups = format.groups(128)
    packed = pack(codes, torch.ones(64, groups), torch.zeros(64, groups, dtype=torch.uint8), format)
    empty = pack(codes * 0, torch.ones(64, groups), torch.zeros(64, groups, dtype=torch.uint8), format)
    return {int(i): int(packed[i]) for i in (packed != empty).nonzero().view(-1)}


def test_int2_bytes() -> None:
    """Output 17 is lane 1 of vector 1; input 106 is k4-step 10 of chunk 1: row 2, its third bit pair."""
    format = KernelFormat(2, 128, "a16", 2)
    assert placed(format, 17, 106, 2) == {(1 * 4 + 1) * 256 + 2 * 64 + 1 * 4 + 2: 2 << 4}


def test_int3_bytes() -> None:
    """As with 2 bits, three rows for two; the second row's third bits lie two below the first's."""
    format = KernelFormat(3, 128, "a16", 2)
    chunk, byte = (1 * 4 + 1) * 384, 1 * 4 + 2
    second = chunk + 3 * 64  # of the pairs of rows
    assert placed(format, 17, 106, 6) == {second + byte: 2 << 4, second + 128 + byte: 1 << 6}
    assert placed(format, 17, 122, 7) == {second + 64 + byte: 3 << 4, second + 128 + byte: 1 << 4}
    assert placed(format, 17, 64 + 4, 4) == {chunk + 128 + 4: 1 << 3}


def test_int3_rows_of_neighboring_vectors_share_their_third_bits() -> None:
    """In groups of 16 a vector has one row: output 17 the second of the first three, output 1 the first."""
    format = KernelFormat(3, 16, "a16", 2)
    assert placed(format, 1, 5, 5) == {4 + 1: 1 << 2, 128 + 4 + 1: 1 << 3}
    assert placed(format, 17, 5, 5) == {64 + 4 + 1: 1 << 2, 128 + 4 + 1: 1 << 1}
    assert placed(format, 33, 15, 4) == {192 + 128 + 4 + 3: 1 << 7}


def test_int4_bytes() -> None:
    """Output 17 is lane 1 of vector 1; input 70 is k4-step 1 of chunk 1, a low nibble; input 102 is step 9, a high one."""
    format = KernelFormat(4, 128, "a16", 2)
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    codes[17, 70], codes[17, 102] = 5, 9
    packed = pack(codes, torch.ones(64, 1), torch.full((64, 1), 8, dtype=torch.uint8), format)
    byte = (1 * 4 + 1) * 512 + 1 * 64 + 1 * 4 + 2
    assert packed[:4096].nonzero().view(-1).tolist() == [byte]
    assert packed[byte].item() == 5 | 9 << 4
    assert packed[4096:4224].view(torch.float16).eq(1).all()
    assert packed[4224:].eq(8).all()


def test_integer_scales_bytes() -> None:
    """Group 0's multiple and zero stand behind both of its chunks, group 1's behind the third: a byte an output."""
    format = KernelFormat(4, 128, "a8-token", 1)
    codes, zeros = torch.full((64, 130), 7, dtype=torch.uint8), torch.full((64, 2), 7, dtype=torch.uint8)
    scales = torch.full((64, 2), 0.5)
    codes[17, 129], zeros[17, 1], scales[17, 1] = 15, 9, 1.5
    packed = pack(codes, scales, zeros, format)
    assert packed.numel() == format.packed_bytes(64, 130) == 3 * (2048 + 64) + 5 * 64
    chunks, tail = packed[: 3 * 2112].view(3, 2112), packed[3 * 2112 :]
    assert chunks[:, 2048 + 17].tolist() == [1 | 7 << 4, 1 | 7 << 4, 3 | 9 << 4]
    assert chunks[2, 512 + 1 * 4 + 1] == 15  # vector 1, k4-step 0
    assert tail[:256].view(torch.float32).eq(0.5).all()
    assert tail[256:].eq(128).all()
    for found, given in zip(unpack(packed, 64, 130, format), (codes, scales, zeros), strict=True):
        assert torch.equal(found, given)


@pytest.mark.parametrize(
    ("scales", "zeros", "message"),
    [
        ([0.1, 0.2573], [8, 8], "no whole multiples"),
        ([1.0, 17.0], [8, 8], "no whole multiples"),
        ([1.0, -2.0], [8, 8], "no whole multiples"),
        ([1.0, float("nan")], [8, 8], "no whole multiples"),
        ([1.0, 9.0], [8, 0], "exceed a signed byte"),
        ([1.0, 2.0], [8, 16], "at most 15"),
    ],
)
def test_integer_scales_that_are_none_are_refused(scales: list[float], zeros: list[int], message: str) -> None:
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        pack(
            codes, torch.tensor([scales]), torch.tensor([zeros], dtype=torch.uint8), KernelFormat(4, 64, "a8-token", 1)
        )


def test_int8_bytes() -> None:
    format = KernelFormat(8, None, "a16", 4)
    codes = torch.zeros(64, 70, dtype=torch.uint8)
    codes[33, 69] = 200
    packed = pack(codes, torch.ones(64, 1), torch.zeros(64, 1, dtype=torch.uint8), format)
    assert packed[:8192].nonzero().view(-1).tolist() == [(1 * 4 + 2) * 1024 + 1 * 64 + 1 * 4 + 1]


def test_gated_blocks_alternate() -> None:
    format = KernelFormat(8, None, "a16", 4)
    codes = torch.arange(140, dtype=torch.uint8)[:, None].expand(140, 64).contiguous()
    packed = pack(codes, torch.ones(140, 1), torch.zeros(140, 1, dtype=torch.uint8), format, glu=True)
    assert packed.view(4, -1)[:, 0].tolist() == [0, 70, 64, 134]


@pytest.mark.parametrize(
    ("scales", "expected"),
    [([1.0, 0.5, 2**-14], 2), ([1.0, 2**-15], 4), ([0.1], 4), ([70000.0], 4), ([65504.0], 2), ([0.0], 4)],
)
def test_scales_are_halves_where_that_is_exact(scales: list[float], expected: int) -> None:
    assert scale_bytes(torch.tensor(scales)) == expected


def test_grouped_rtn_gets_half_scales() -> None:
    weight = torch.randn(64, 256)
    assert scale_bytes(rtn(weight, Format(4, 128)).scales) == 2
    assert scale_bytes(rtn(weight, Format(8)).scales) == 4
