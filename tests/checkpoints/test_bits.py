"""Dense codes: the stream that the format's page describes, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpass.checkpoints.bits import dense_bytes, pack_bits, unpack_bits


def as_documented(codes: list[int], bits: int) -> bytes:
    number = sum(code << k * bits for k, code in enumerate(codes))
    return number.to_bytes(dense_bytes(len(codes), bits), "little")


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), n=st.integers(1, 5), k=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_row_is_a_little_endian_stream(bits: int, n: int, k: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(codes, bits)
    assert [bytes(row.tolist()) for row in packed] == [as_documented(row.tolist(), bits) for row in codes]
    assert torch.equal(unpack_bits(packed, bits, k), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_rows_are_worked_on_in_parts(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (20, 1 << 15), dtype=torch.uint8)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, 1 << 15), codes)
