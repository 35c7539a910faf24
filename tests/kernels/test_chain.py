"""qpass::chain: the same bits as its calls one by one, natively and in plain torch; programs that are refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_cases import SERVES, Weight, use
from torch import Tensor

from qpass.kernels import attention_unit
from qpass.kernels.format import KernelFormat
from qpass.ops.chain import _chain, _one

pytestmark = pytest.mark.skipif(not SERVES, reason="needs AVX2")

FORMAT = KernelFormat(4, 32, "a8-token-group", 2)
HEADS, SHARED, WIDTH, SLOTS = 4, 2, 32, 50
K = HEADS * WIDTH


class Layer:
    """What stands behind rotary in a decoder's layer: attention, a linear with a residual, a gated one with a norm."""

    def __init__(self, batch: int = 2, queries: int = 3) -> None:
        use(FORMAT)
        attention_unit.ensure()
        self.q = torch.randn(batch, HEADS, queries, WIDTH).bfloat16()
        self.k, self.v = (torch.randn(batch, SHARED, SLOTS, WIDTH).bfloat16() for _ in range(2))
        last = torch.arange(SLOTS - queries, SLOTS, dtype=torch.int32) + 1
        self.span = torch.stack([torch.zeros_like(last), last], -1)[None, None].repeat(batch, 1, 1, 1)
        self.o, self.gate_up = Weight.random(K, K, FORMAT), Weight.random(64, K, FORMAT, glu=True)
        self.packed = self.o.packed(), self.gate_up.packed()
        self.residual, self.norm = torch.randn(batch, queries, K).bfloat16(), torch.rand(K)

    def tensors(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.span, self.packed[0], self.residual, self.packed[1], self.norm]

    program = "\n".join(
        [
            "inputs 8",
            "attention %0 %1 %2 %3 0.125 0.0 - -",
            "flatten %8",
            f"packed_linear %9 %4 - - %5 {K} {K} {FORMAT.number} 0 0 0 - - 0.0 - - - - - 0 0 0.0 0.0",
            f"packed_linear %10 %6 - - - 64 {K} {FORMAT.number} 4 1 1 %7 - 1e-06 - - - - - 0 0 0.0 0.0",
            "return %10 %11",
        ]
    )

    def one_by_one(self) -> list[Tensor]:
        linear, number = torch.ops.qpass.packed_linear, FORMAT.number
        heads = torch.ops.qpass.attention(self.q, self.k, self.v, self.span, 0.125)
        x = linear(heads.flatten(-2), self.packed[0], None, None, self.residual, K, K, number, 0, False)
        more = {"norm": 1, "norm_weight": self.norm, "norm_eps": 1e-6}
        return [x, linear(x, self.packed[1], None, None, None, 64, K, number, 4, True, **more)]


@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (2, 3), (1, 70), (3, 0)])
def test_the_same_bits_as_one_by_one(batch: int, queries: int) -> None:
    layer = Layer(batch, queries)
    wanted = layer.one_by_one()
    for run in (torch.ops.qpass.chain, _chain):
        got = run(layer.tensors(), layer.program)
        assert [t.shape for t in got] == [(batch, queries, K), (batch, queries, 32)]
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_fake_knows_shapes_and_dtypes() -> None:
    layer = Layer()
    compiled = torch.compile(
        lambda tensors: [t + 1 for t in torch.ops.qpass.chain(tensors, layer.program)], fullgraph=True, dynamic=True
    )
    for a, b in zip(compiled(layer.tensors()), layer.one_by_one(), strict=True):
        assert torch.equal(a, b + 1)


def test_inputs_stay_as_they_are_and_results_share_nothing() -> None:
    layer = Layer()
    before = [t.clone() for t in layer.tensors()]
    out = torch.ops.qpass.chain(layer.tensors(), layer.program)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.tensors(), strict=True))
    owners = {t.untyped_storage().data_ptr() for t in layer.tensors()}
    assert len({t.untyped_storage().data_ptr() for t in out} - owners) == 2


def test_several_python_threads() -> None:
    layers = [Layer(1, n) for n in (1, 2, 5, 33)]
    wanted = [layer.one_by_one()[1] for layer in layers]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda i: torch.ops.qpass.chain(layers[i % 4].tensors(), Layer.program)[1], range(100))
        assert all(torch.equal(a, b) for a, b in zip(results, wanted * 25, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_threads(count: int) -> None:
    """Threads stay together for all of a program; with one there are none to keep."""
    layer, before = Layer(1, 70), torch.get_num_threads()
    wanted = layer.one_by_one()
    try:
        torch.set_num_threads(count)
        got = torch.ops.qpass.chain(layer.tensors(), layer.program)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_call_that_fails_ends_the_program_and_nothing_else() -> None:
    """The error comes out of the parallel region, and the next program has its threads."""
    layer = Layer(1, 70)
    wanted = layer.one_by_one()
    for _ in range(20):
        with pytest.raises(RuntimeError, match="the weight 64 inputs"):
            torch.ops.qpass.chain(layer.tensors(), layer.program.replace(f"64 {K}", f"64 {K // 2}"))
        got = torch.ops.qpass.chain(layer.tensors(), layer.program)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_program_that_rotates_and_writes_caches() -> None:
    """rope_append, the cache as attention reads it, attention: what fuse_rope leaves of a layer."""
    use(FORMAT)
    attention_unit.ensure()
    qkv = torch.randn(2, 3, (HEADS + 2 * SHARED) * WIDTH).bfloat16()
    cos, sin = (torch.randn(2, 3, WIDTH).bfloat16() for _ in range(2))
    slots = torch.tensor([[4, 5, 6], [9, 10, 11]])
    caches = [torch.randn(SLOTS, 2, SHARED, WIDTH).bfloat16() for _ in range(2)]
    span = torch.stack([torch.zeros_like(slots), slots + 1], -1)[:, None].to(torch.int32)
    program = "\n".join(
        [
            "inputs 7",
            "rope_append %0 %1 %2 %3 %5 %6",
            "slots %5",
            "slots %6",
            "attention %7 %8 %9 %4 0.125 0.0 - -",
            "flatten %10",
            "return %11",
        ]
    )
    results = []
    for run in (torch.ops.qpass.chain.one, _one):
        written = [cache.clone() for cache in caches]
        results.append([run([qkv, cos, sin, slots, span], written, program), *written])
    assert results[0][0].shape == (2, 3, K)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][1], caches[0])
    with pytest.raises(RuntimeError, match="slot 99 is outside"):
        torch.ops.qpass.chain.one([qkv, cos, sin, slots * 0 + 99, span], caches, program)
    with pytest.raises(RuntimeError, match="the program has 1 results, not 2"):
        torch.ops.qpass.chain.two([qkv, cos, sin, slots, span], [cache.clone() for cache in caches], program)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("inputs 8", "inputs 9", "the program takes 9 tensors, not 8"),
        ("inputs 8", "outputs 8", "the number of inputs is missing"),
        ("inputs 8", "inputs -8", "the number of inputs is missing"),
        ("attention", "intention", "there is no native op intention"),
        ("%0 %1", "%0 %8", "slot %8 is not known yet; there are 8"),
        ("%0 %1", "%0 %-1", "slot %-1 is not known yet"),
        ("%0 %1", "%0 %", "'%' is not a slot"),
        ("%0 %1", "%0 1", "'1' is not a slot"),
        ("%0 %1", "%0 -", "attention lacks one of its tensors"),
        ("%3 0.125", "%3 x", "attention: 'x' is not a number"),
        ("0.0 - -\n", "0.0 -\n", "attention has too few arguments"),
        ("0.0 - -\n", "0.0 - - -\n", "attention has too many arguments"),
        ("return %10 %11", "return %12", "slot %12 is not known yet"),
        ("\nreturn %10 %11", "", "the program is not complete"),
        ("return", "return %10\nflatten", "behind the program's end"),
        ("flatten %8\n", "\n", "an empty line"),
        (f"{K} {K}", f"{K} {K + 1}", "packed_linear: x has shape"),
        (f"{FORMAT.number} 0", "999 0", "no kernel is loaded for format 999"),
        (f"{K} {K}", f"{K + 64} {K}", "packed_linear: packed holds"),
        ("%9 %4", "%9 %3", "packed_linear: packed must be"),
    ],
)
def test_programs_that_are_refused(old: str, new: str, message: str) -> None:
    layer = Layer()
    assert old in layer.program
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qpass.chain(layer.tensors(), layer.program.replace(old, new, 1))
