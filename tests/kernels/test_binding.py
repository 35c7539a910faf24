"""The torch op: what it accepts in any form, and what it refuses with a sentence. It must never crash."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_cases import SERVES, Weight, name_of, product, run, sqnr_db, use

from qpass.kernels.format import KernelFormat

pytestmark = pytest.mark.skipif(not SERVES, reason="needs AVX2")

FORMAT = KernelFormat(4, 64, "a16", 2)
A8 = KernelFormat(8, None, "a8-token", 4)


@pytest.fixture
def weight() -> Weight:
    use(FORMAT)
    return Weight.random(70, 100, FORMAT)


@pytest.mark.parametrize(
    "shape", [(100,), (1, 100), (3, 100), (2, 3, 100), (2, 1, 3, 100), (0, 100), (2, 0, 100)], ids=str
)
def test_any_rank(weight: Weight, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y = run(x, weight)
    assert y.shape == (*shape[:-1], 70)
    assert y.is_contiguous()
    if x.numel():
        assert sqnr_db(product(x.reshape(-1, 100), weight).view(y.shape), y) > 100


def test_any_strides(weight: Weight) -> None:
    base = torch.randn(4, 6, 200)
    views = [
        base[:, :, :100],
        base[:, :, 100:],
        base[::2, :, 50:150],
        base[:, ::2, :100],
        base[:, :, ::2],
        base.transpose(0, 1)[..., :100],
        base[:1, :1, :100].expand(3, 5, 100),
        base[0, 0, :100],
        base[1:2, :, :100],
        torch.randn(100, 7).t(),
        torch.randn(5, 1).expand(5, 100),
    ]
    for view in views:
        assert torch.equal(run(view, weight), run(view.contiguous(), weight)), (view.shape, view.stride())


def test_unaligned_data(weight: Weight) -> None:
    packed = weight.packed()
    shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:]
    shifted.copy_(packed)
    x = torch.randn(301)[1:].view(3, 100)
    assert torch.equal(run(x, weight, packed=shifted), run(x.clone(), weight, packed=packed))


@pytest.mark.parametrize("format", [FORMAT, A8], ids=name_of)
def test_several_python_threads(format: KernelFormat) -> None:
    use(format)
    weights = [Weight.random(130, 200 + 30 * i, format) for i in range(4)]
    cases = [(w, w.packed(), torch.randn(m, w.shape[1])) for w in weights for m in (1, 7, 300)]
    expected = [run(x, w, packed=p) for w, p, x in cases]

    def work(start: int) -> bool:
        order = [(start + i) % len(cases) for i in range(5 * len(cases))]
        return all(torch.equal(run(cases[i][2], cases[i][0], packed=cases[i][1]), expected[i]) for i in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def call(weight: Weight, **changes: object) -> torch.Tensor:
    n, k = weight.shape
    arguments = {
        "x": torch.randn(2, k),
        "packed": weight.packed(),
        "bias": None,
        "mul": None,
        "residual": None,
        "n": n,
        "k": k,
        "format": weight.format.number,
        "activation": 0,
        "glu": False,
    }
    return torch.ops.qpass.packed_linear(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(2, 99)}, "x has shape .2, 99., the weight 100 inputs"),
        ({"x": torch.randn(())}, "x has shape"),
        ({"x": torch.randn(2, 100).double()}, "x must be float32, bfloat16 or float16"),
        ({"x": torch.ones(2, 100, dtype=torch.int32)}, "x must be float32"),
        ({"packed": torch.zeros(10, dtype=torch.uint8)}, "packed holds 10 bytes; n = 70, k = 100 need"),
        ({"packed": torch.zeros(0, dtype=torch.uint8)}, "packed holds 0 bytes"),
        ({"packed": torch.zeros(2, 64, dtype=torch.uint8)}, "one-dimensional uint8"),
        ({"packed": torch.zeros(9728)}, "one-dimensional uint8"),
        ({"packed": torch.zeros(20000, dtype=torch.uint8)[::2]}, "contiguous"),
        ({"n": 0}, "must be positive"),
        ({"n": -70}, "must be positive"),
        ({"n": 1 << 40}, "must be positive|need"),
        ({"n": 129}, "packed holds"),
        ({"k": 101}, "the weight 101 inputs"),
        ({"format": 63}, "no kernel is loaded for format 63"),
        ({"format": -1}, "no kernel is loaded"),
        ({"format": 1 << 40}, "no kernel is loaded"),
        ({"activation": 5}, "unknown activation 5"),
        ({"activation": -1}, "unknown activation"),
        ({"bias": torch.zeros(69)}, "bias has 69 elements, the weight 70 outputs"),
        ({"bias": torch.zeros(70).half()}, "float32"),
        ({"bias": torch.zeros(70, 1)}, "one-dimensional"),
        ({"bias": torch.zeros(140)[::2]}, "contiguous"),
        ({"mul": torch.zeros(2, 69)}, "mul has shape .2, 69., the output .2, 70."),
        ({"mul": torch.zeros(70)}, "mul has shape"),
        ({"mul": torch.zeros(2, 70).half()}, "mul must have float32 elements"),
        ({"residual": torch.zeros(2, 2, 70)}, "residual has shape"),
        ({"glu": True, "n": 71}, "must be even"),
        ({"norm": 3}, "unknown norm 3; accepted: 0, 1, 2"),
        ({"norm": -1}, "unknown norm"),
        ({"norm": 1 << 40}, "unknown norm"),
        ({"norm_weight": torch.ones(100)}, "those of a norm, and norm is 0"),
        ({"norm_bias": torch.ones(100)}, "those of a norm, and norm is 0"),
        ({"norm": 1, "norm_weight": torch.ones(99)}, "norm_weight has 99 elements, the weight 100 inputs"),
        ({"norm": 1, "norm_weight": torch.ones(100).bfloat16()}, "norm_weight must be .* float32"),
        ({"norm": 2, "norm_weight": torch.ones(100, 1)}, "one-dimensional"),
        ({"norm": 2, "norm_bias": torch.ones(70)}, "norm_bias has 70 elements, the weight 100 inputs"),
        ({"norm": 2, "norm_bias": torch.ones(200)[::2]}, "norm_bias must be a contiguous"),
        ({"norm": 1, "norm_eps": -1e-6}, "norm_eps must be finite and not negative"),
        ({"norm": 1, "norm_eps": float("nan")}, "norm_eps must be finite"),
        ({"norm": 1, "norm_eps": 1e300}, "norm_eps must be finite"),
        ({"x_scale": 0.1}, "takes no x_scale"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_bad_arguments_are_refused(weight: Weight, changes: dict[str, object], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(weight, **changes)
    assert call(weight).shape == (2, 70)


def test_fake_knows_the_shape(weight: Weight) -> None:
    packed = weight.packed()

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.qpass.packed_linear(x, packed, None, None, None, 70, 100, FORMAT.number, 0, False)

    x = torch.randn(2, 3, 100)
    assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(x), f(x))
    meta = torch.ops.qpass.packed_linear(
        x.to("meta"), packed.to("meta"), None, None, None, 70, 100, FORMAT.number, 0, True
    )
    assert meta.shape == (2, 3, 35)
