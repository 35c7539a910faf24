"""rope_append: the same bits as its plain-torch meaning, slots that nobody named untouched, refusals. On each instruction set here."""

from __future__ import annotations

import pytest
import torch
from attention_units import UNITS
from torch import Tensor

from qpass.kernels import attention_unit
from qpass.ops.rope_append import _rope_append

pytestmark = pytest.mark.skipif(not UNITS, reason="needs AVX2")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case:
    """q|k|v of some tokens, tables, and caches that hold something already."""

    def __init__(
        self, batch=2, queries=3, heads=4, shared=2, width=32, value_width=None, rotated=None, tables=None, length=40,
        dtype=torch.bfloat16,
    ):  # fmt: skip
        value_width, rotated = value_width or width, width if rotated is None else rotated
        columns = heads * width + shared * (width + value_width)
        self.qkv = torch.randn(batch, queries, columns).to(dtype)
        self.cos, self.sin = (torch.randn(tables or batch, queries, rotated).to(dtype) for _ in range(2))
        self.slots = torch.stack([torch.randperm(length)[:queries] for _ in range(batch)])
        self.keys = torch.randn(length, batch, shared, width).to(dtype)
        self.values = torch.randn(length, batch, shared, value_width).to(dtype)

    def run(self, op=None) -> list[Tensor]:
        """The queries and what both caches hold then."""
        keys, values = self.keys.clone(), self.values.clone()
        op = op or torch.ops.qpass.rope_append
        return [op(self.qkv, self.cos, self.sin, self.slots, keys, values), keys, values]

    def check(self) -> None:
        for got, wanted in zip(self.run(), self.run(_rope_append), strict=True):
            assert got.shape == wanted.shape
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "rotated"), [(8, 8), (34, 34), (64, 64), (80, 32), (96, 2), (128, 128), (256, 100)])
def test_widths_and_rotated_shares(unit, dtype, width, rotated) -> None:
    Case(width=width, rotated=rotated, dtype=dtype).check()


@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (12, 2), (9, 3), (7, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_heads_batches_and_tokens(unit, heads, shared, batch) -> None:
    for queries in (0, 1, 2, 33):
        Case(batch, queries, heads, shared, value_width=24).check()
        Case(batch, queries, heads, shared, tables=1).check()


def test_without_tables_nothing_is_rotated(unit) -> None:
    case = Case(dtype=torch.float16)
    case.cos = case.sin = None
    case.check()
    queries, keys, _ = case.run()
    assert torch.equal(queries, case.qkv[..., :128].unflatten(-1, (4, 32)).transpose(1, 2))
    assert torch.equal(keys[case.slots[1, 2], 1], case.qkv[1, 2, 128:192].view(2, 32))


def test_only_named_slots_are_written(native) -> None:
    case = Case()
    for before, after in zip((case.keys, case.values), case.run()[1:], strict=True):
        for row in range(2):
            others = [slot for slot in range(40) if slot not in case.slots[row].tolist()]
            assert torch.equal(after[others, row], before[others, row])
            assert not torch.equal(after[case.slots[row], row], before[case.slots[row], row])


def test_a_token_has_the_same_bits_whatever_comes_with_it(native) -> None:
    """A hundred tokens on one and several threads, and each alone."""
    case = Case(1, 100, length=100)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = case.run()
        for count in (2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(case.run(), whole, strict=True))
    finally:
        torch.set_num_threads(threads)
    qkv, cos, sin, slots = case.qkv, case.cos, case.sin, case.slots
    for token in range(0, 100, 9):
        case.qkv, case.cos, case.sin, case.slots = (t[:, token : token + 1] for t in (qkv, cos, sin, slots))
        queries, keys, values = case.run()
        assert torch.equal(queries, whole[0][:, :, token : token + 1])
        slot = slots[0, token]
        assert torch.equal(keys[slot], whole[1][slot])
        assert torch.equal(values[slot], whole[2][slot])


def test_any_strides(native) -> None:
    case = Case()
    wanted = case.run()
    case.qkv = torch.cat([case.qkv, case.qkv], -1)[..., : case.qkv.shape[2]]
    case.cos, case.sin = (t.mT.contiguous().mT for t in (case.cos, case.sin))
    case.slots = case.slots.t().contiguous().t()
    case.keys = torch.cat([case.keys, case.keys], 3)[..., : case.keys.shape[3]]
    case.values = case.values.transpose(0, 2).contiguous().transpose(0, 2)
    assert all(torch.equal(a, b) for a, b in zip(case.run(), wanted, strict=True))
    case.qkv = case.qkv.mT.contiguous().mT
    assert all(torch.equal(a, b) for a, b in zip(case.run(), wanted, strict=True))


def test_inside_of_a_graph_the_caches_are_written_once() -> None:
    attention_unit.ensure()
    case = Case()

    def step(qkv, keys, values):
        return torch.ops.qpass.rope_append(qkv * 2, case.cos, case.sin, case.slots, keys, values) + 1

    keys, values = case.keys.clone(), case.values.clone()
    queries = torch.compile(step, fullgraph=True)(case.qkv, keys, values)
    case.qkv = case.qkv * 2
    wanted = case.run()
    assert torch.equal(queries, wanted[0] + 1)
    assert torch.equal(keys, wanted[1])
    assert torch.equal(values, wanted[2])


def change(**parts) -> Case:
    case = Case()
    for name, value in parts.items():
        setattr(case, name, value)
    return case


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"qkv": torch.randn(2, 3, 256).double()}, "qkv must be float32, bfloat16 or float16"),
        ({"qkv": torch.randn(6, 256).bfloat16()}, "qkv must be .batch, tokens, columns."),
        ({"qkv": torch.randn(2, 3, 250).bfloat16()}, "qkv has 250 columns, which is no number of query heads"),
        ({"qkv": torch.randn(2, 3, 128).bfloat16()}, "qkv has 128 columns"),
        ({"qkv": torch.randn(1, 3, 256).bfloat16()}, r"keys has shape \[40, 2, 2, 32\]"),
        ({"keys": torch.randn(40, 2, 2, 32)}, "keys must have qkv's dtype"),
        ({"keys": torch.randn(39, 2, 2, 32).bfloat16()}, "must have the same slots and heads"),
        ({"values": torch.randn(40, 2, 1, 32).bfloat16()}, "must have the same slots and heads"),
        ({"keys": torch.randn(40, 2, 32, 2).bfloat16().mT}, "keys must be dense in its last dimension"),
        ({"sin": None}, "cos and sin come together"),
        ({"sin": torch.randn(2, 3, 16).bfloat16()}, "cos has shape"),
        ({"cos": torch.randn(2, 3, 32)}, "cos must have qkv's dtype"),
        ({"cos": torch.randn(2, 4, 32).bfloat16()}, r"cos has shape \[2, 4, 32\]"),
        ({n: torch.randn(2, 3, 31).bfloat16() for n in ("cos", "sin")}, "rotates 31 columns of 32"),
        ({n: torch.randn(2, 3, 34).bfloat16() for n in ("cos", "sin")}, "rotates 34 columns of 32"),
        ({"slots": torch.zeros(2, 3, dtype=torch.int32)}, r"slots must be int64 \[2, 3\]"),
        ({"slots": torch.zeros(2, 2, dtype=torch.int64)}, r"slots must be int64 \[2, 3\]"),
        ({"slots": torch.full((2, 3), 40)}, "slot 40 is outside of a cache of 40"),
        ({"slots": torch.full((2, 3), -1)}, "slot -1 is outside"),
    ],
)  # fmt: skip
def test_what_is_refused(native, parts, message) -> None:
    case = change(**parts)
    keys, values = case.keys.clone(), case.values.clone()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qpass.rope_append(case.qkv, case.cos, case.sin, case.slots, keys, values)
    assert torch.equal(keys, case.keys)
    assert torch.equal(values, case.values)
