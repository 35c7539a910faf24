"""Attention against fp64 softmax; a row's bits, whatever is computed with it; refusals. On each instruction set here."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_units import UNITS
from torch import Tensor

from qpass.errors import KernelError
from qpass.kernels import attention_unit
from qpass.ops.attention import _attention, from_int8, to_int8
from tests.support.tolerance import sqnr_db

pytestmark = pytest.mark.skipif(not UNITS, reason="needs AVX2")

# fp32: steps of 2^-24 over some hundred terms. bf16 and fp16: one rounding of the output is 2^-9 and 2^-12 at most, 56
# and 74 dB for values spread evenly; bf16 weights before the second product cost as much again.
BAR_DB = {torch.float32: 115.0, torch.bfloat16: 50.0, torch.float16: 70.0}


class Case:
    """Random queries over a cache stored as the runtime stores it, token first."""

    def __init__(
        self, batch=1, heads=4, shared=2, queries=5, slots=100, width=64, value_width=None, dtype=torch.bfloat16
    ):
        self.q = torch.randn(batch, heads, queries, width).to(dtype)
        self.k = torch.randn(slots, batch, shared, width).to(dtype).permute(1, 2, 0, 3)
        self.v = torch.randn(slots, batch, shared, value_width or width).to(dtype).permute(1, 2, 0, 3)
        self.scale = width**-0.5
        self.span = causal(batch, queries, slots)
        self.more: dict[str, object] = {}

    def int8(self) -> Case:
        self.k, self.v = (to_int8(t.permute(2, 0, 1, 3)).permute(1, 2, 0, 3) for t in (self.k, self.v))
        return self

    def run(self, rows: slice = slice(None), batch: slice = slice(None)) -> Tensor:
        q, span = self.q[batch, :, rows], self.span[batch, :, rows]
        return torch.ops.qpass.attention(q, self.k[batch], self.v[batch], span, self.scale, **self.more)

    def exact(self) -> Tensor:
        """The meaning, in fp64."""
        q, *kv = self.q.double(), self.k, self.v
        k, v = ((from_int8(t) if t.dtype == torch.int8 else t).double() for t in kv)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("bhqd,bhld->bhql", q, k) * self.scale
        if cap := self.more.get("softcap"):
            scores = cap * torch.tanh(scores / cap)
        slot = torch.arange(k.shape[2])
        first, last = self.span[..., :1], self.span[..., 1:]
        if (slopes := self.more.get("slopes")) is not None:
            scores = scores + slopes.double()[:, None, None] * (slot - last + 1)
        weights = torch.exp(scores - scores.amax(3, keepdim=True)) * ((slot >= first) & (slot < last))
        total = weights.sum(3, keepdim=True)
        if (sinks := self.more.get("sinks")) is not None:
            total = total + torch.exp(sinks.double()[:, None, None] - scores.amax(3, keepdim=True))
        return torch.einsum("bhql,bhld->bqhd", weights / total, v)

    def check(self, bar: float | None = None) -> None:
        assert sqnr_db(self.exact(), self.run()) > (bar or BAR_DB[self.q.dtype])


def causal(batch: int, queries: int, slots: int, window: int | None = None) -> Tensor:
    last = torch.arange(slots - queries, slots, dtype=torch.int32) + 1
    first = torch.zeros_like(last) if window is None else (last - window).clamp_min(0)
    return torch.stack([first, last], -1)[None, None].repeat(batch, 1, 1, 1)


@pytest.mark.parametrize("dtype", BAR_DB, ids=str)
@pytest.mark.parametrize("width", [8, 33, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (12, 2), (9, 3), (7, 1)])
def test_widths_and_shared_heads(unit, dtype, width, heads, shared) -> None:
    Case(2, heads, shared, 5, 150, width, dtype=dtype).check()


@pytest.mark.parametrize(("queries", "slots"), [(1, 1), (1, 64), (1, 65), (1, 1000), (17, 17), (70, 200), (300, 300)])
def test_lengths(unit, queries, slots) -> None:
    Case(1, 6, 2, queries, slots, 64, 48).check()
    Case(1, 2, 2, queries, slots, 16, 80, dtype=torch.float32).check()


@pytest.mark.parametrize("dtype", BAR_DB, ids=str)
def test_windows_and_padding(unit, dtype) -> None:
    case = Case(3, 6, 2, 40, 300, dtype=dtype)
    case.span = causal(3, 40, 300, window=70)
    case.span[1, ..., 0].clamp_(min=250)
    case.span[2, :, :5] = torch.tensor([290, 291])
    case.check()


@pytest.mark.parametrize("dtype", BAR_DB, ids=str)
@pytest.mark.parametrize("parts", ["softcap", "slopes", "sinks", "all"])
def test_softcap_slopes_and_sinks(unit, dtype, parts) -> None:
    case = Case(2, 6, 2, 20, 200, dtype=dtype)
    every = {"softcap": 1.5, "slopes": torch.rand(6) * 0.2, "sinks": torch.randn(6)}
    case.more = every if parts == "all" else {parts: every[parts]}
    case.check()


@pytest.mark.parametrize("dtype", BAR_DB, ids=str)
@pytest.mark.parametrize("width", [8, 33, 80, 128])
def test_int8_keys_and_values(unit, dtype, width) -> None:
    Case(2, 6, 2, 9, 200, width, dtype=dtype).int8().check()


def test_the_plain_torch_meaning_is_the_same() -> None:
    case = Case(2, 6, 2, 20, 200, dtype=torch.float32).int8()
    case.more = {"softcap": 1.5, "slopes": torch.rand(6) * 0.2, "sinks": torch.randn(6)}
    case.span[1, :, 3] = torch.tensor([7, 7])
    got = _attention(case.q, case.k, case.v, case.span, case.scale, **case.more)
    assert torch.equal(got[1, 3], torch.zeros_like(got[1, 3]))
    assert torch.equal(case.run()[1, 3], torch.zeros_like(got[1, 3]))
    case.span[1, :, 3] = torch.tensor([7, 9])
    got = _attention(case.q, case.k, case.v, case.span, case.scale, **case.more)
    assert sqnr_db(case.exact(), got) > BAR_DB[torch.float32]


@pytest.mark.parametrize("kind", ["bf16", "fp32", "int8", "mqa"])
def test_a_row_has_the_same_bits_whatever_is_computed_with_it(unit, kind) -> None:
    """64 queries at once, and in every other split; each row of the batch alone; one, two and three threads."""
    case = Case(
        3, 12, 1 if kind == "mqa" else 2, 64, 700, 80, dtype=torch.float32 if kind == "fp32" else torch.bfloat16
    )
    case.span = causal(3, 64, 700, window=500)
    case.span[0, ..., 0] = 0
    if kind == "int8":
        case.int8()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = case.run()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(case.run(), whole)
            for row in range(3):
                assert torch.equal(case.run(batch=slice(row, row + 1)), whole[row : row + 1])
            for height in (1, 2, 3, 5, 7, 16, 33, 63):
                parts = [case.run(slice(i, i + height)) for i in range(0, 64, height)]
                assert torch.equal(torch.cat(parts, 1), whole), (count, height)
    finally:
        torch.set_num_threads(threads)


def test_slots_outside_of_a_span_change_nothing(native) -> None:
    """Not what the cache holds behind them, not where it ends."""
    case = Case(1, 6, 2, 1, 500)
    case.span[..., 0], case.span[..., 1] = 70, 331
    wanted = case.run()
    case.k[:, :, :70] = case.k[:, :, 331:] = float("nan")
    case.v[:, :, :70] = case.v[:, :, 331:] = float("inf")
    assert torch.equal(case.run(), wanted)
    case.k, case.v = case.k[:, :, :331], case.v[:, :, :331]
    assert torch.equal(case.run(), wanted)


def test_extreme_scores_stay_finite_and_nan_stays_nan(unit) -> None:
    case = Case(1, 2, 2, 3, 200, dtype=torch.float32)
    case.q *= 1e4
    assert torch.isfinite(case.run()).all()
    case.check()
    case.q[0, 1, 2, 5] = float("nan")
    out = case.run()
    assert out[0, 2, 1].isnan().all()
    assert torch.isfinite(out[0, :2]).all()


def test_any_strides(native) -> None:
    case = Case(2, 4, 2, 6, 90, 32)
    wanted = case.run()
    q, k, v = case.q, case.k, case.v
    forms = [
        lambda t: t.contiguous(),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    ]
    for a, b, c in itertools.product(forms, repeat=3):
        case.q, case.k, case.v = a(q), b(k), c(v)
        assert torch.equal(case.run(), wanted)
    case.span = case.span.flip(3).flip(3).mT.contiguous().mT
    assert torch.equal(case.run(), wanted)


def test_nothing_to_do(native) -> None:
    assert Case(1, 4, 2, 0, 10).run().shape == (1, 0, 4, 64)
    empty = Case(2, 4, 2, 3, 3)
    empty.k, empty.v = empty.k[:, :, :0], empty.v[:, :, :0]
    assert torch.equal(empty.run(), torch.zeros(2, 3, 4, 64, dtype=torch.bfloat16))


def test_spans_are_held_within_the_slots(native) -> None:
    case = Case(1, 4, 2, 4, 50)
    case.span[0, 0] = torch.tensor([[-(2**31), 2**31 - 1], [0, 50], [40, 10], [60, 70]])
    out = case.run()
    case.span[0, 0, 0] = torch.tensor([0, 50])
    assert torch.equal(out, case.run())
    assert not out[0, 2:].any()


def test_several_python_threads(native) -> None:
    cases = [Case(1, 6, 2, n, 400) for n in (1, 3, 40, 130)]
    wanted = [case.run() for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(lambda i: cases[i % 4].run(), range(200)), wanted * 50, strict=True):
            assert torch.equal(got, expected)


def change(**parts) -> Case:
    case = Case(2, 4, 2, 3, 20, 16)
    for name, value in parts.items():
        setattr(case, name, value)
    return case


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (lambda: change(q=torch.randn(2, 5, 3, 16).bfloat16()), "5 query heads can't share 2 key heads"),
        (lambda: change(q=torch.randn(2, 4, 3, 16)), "k must have q's dtype or be int8"),
        (lambda: change(q=torch.randn(2, 4, 3, 16).double()), "q must be float32, bfloat16 or float16"),
        (lambda: change(q=torch.randn(4, 3, 16).bfloat16()[None, None]), "must be .batch, heads, tokens, width."),
        (lambda: change(k=torch.randn(2, 2, 20, 17).bfloat16()), r"k has shape \[2, 2, 20, 17\]"),
        (lambda: change(k=torch.randn(1, 2, 20, 16).bfloat16()), r"k has shape \[1, 2, 20, 16\]"),
        (lambda: change(v=torch.randn(2, 2, 19, 16).bfloat16()), r"v has shape \[2, 2, 19, 16\]"),
        (lambda: change(v=torch.randn(2, 2, 20, 16)), "v must have k's dtype"),
        (lambda: change(span=causal(2, 3, 20).long()), "span must be int32"),
        (lambda: change(span=causal(1, 3, 20)), r"span has shape \[1, 1, 3, 2\]"),
        (lambda: change(span=causal(2, 4, 20)), r"span has shape \[2, 1, 4, 2\]"),
        (lambda: change(more={"slopes": torch.ones(3)}), "slopes must be float32 on the CPU, one a head"),
        (lambda: change(more={"sinks": torch.ones(4).double()}), "sinks must be float32"),
        (lambda: change(more={"softcap": -1.0}), "softcap must not be negative"),
        (lambda: change(k=torch.zeros(2, 2, 20, 16).char(), v=torch.zeros(2, 2, 20, 20).char()), "k has shape"),
        (lambda: change(k=torch.zeros(2, 2, 20, 20).char(), v=torch.zeros(2, 2, 20, 4).char()), "width must be 1"),
    ],
)
def test_what_is_refused(native, case, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        case().run()


def test_memory_of_a_call_before_leaves_no_trace(unit) -> None:
    bad = Case(1, 6, 2, 300, 300)
    bad.k[:] = bad.v[:] = float("nan")
    for queries in (300, 70, 1):
        bad.run()
        Case(1, 2, 2, queries, 300, 16, 80, dtype=torch.float32).check()


def test_int8_is_within_half_a_step() -> None:
    x = torch.randn(3, 4, 50) * torch.logspace(-20, 20, 4)[:, None]
    x[1, 2] = 0
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((from_int8(to_int8(x)) - x).abs() <= 0.5001 * step).all()
    assert torch.equal(torch.compile(to_int8, fullgraph=True)(x), to_int8(x))


def test_a_machine_without_avx2_is_told_why() -> None:
    with pytest.raises(KernelError, match="needs AVX2"):
        attention_unit.ensure(tier="none")
