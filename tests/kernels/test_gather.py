"""Rows of a packed weight as an embedding reads them: exactly those that its codes stand for."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BARS, SERVES, Weight, name_of, use

from qpass.kernels.format import BITS, GROUPS, KernelFormat

pytestmark = pytest.mark.skipif(not SERVES, reason="needs AVX2")

N, K = 140, 300
FORMATS = [KernelFormat(bits, group, "a16", 2 if group else 4) for bits in BITS for group in GROUPS]
"""The activation rule makes no difference here."""


def gather(ids: torch.Tensor, weight: Weight, dtype: torch.dtype = torch.float32, **changes: object) -> torch.Tensor:
    arguments = {"n": N, "k": K, "format": weight.format.number, "dtype": dtype} | changes
    if "packed" not in arguments:
        arguments["packed"] = weight.packed()
    return torch.ops.qpass.packed_embedding(ids, **arguments)


def dense(weight: Weight) -> torch.Tensor:
    """fp32, in the order of operations of QWeight.dequantize()."""
    length = weight.format.group or K
    zeros, scales = (t.float().repeat_interleave(length, 1)[:, :K] for t in (weight.zeros, weight.scales))
    return (weight.codes.float() - zeros) * scales


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_every_row_of_every_format(format: KernelFormat, dtype: torch.dtype) -> None:
    use(format)
    weight = Weight.random(N, K, format)
    assert torch.equal(gather(torch.arange(N), weight, dtype), dense(weight).to(dtype))


def test_any_form_of_ids() -> None:
    format = KernelFormat(8, None, "a16", 4)
    use(format)
    weight = Weight.random(N, K, format)
    table = dense(weight)
    ids = torch.randint(0, N, (3, 8))
    for given in (ids, ids.int(), ids.t(), ids[:, ::2], ids[0], ids[0, 0], ids[:0], ids.expand(2, 3, 8)):
        y = gather(given, weight)
        assert y.shape == (*given.shape, K)
        assert torch.equal(y, torch.nn.functional.embedding(given, table))


@pytest.mark.parametrize(
    ("ids", "changes", "message"),
    [
        ([0, N], {}, f"index out of range: id {N}, the table has {N} rows"),
        ([-1], {}, "index out of range: id -1"),
        ([1 << 40], {}, "index out of range"),
        ([0.5], {}, "ids must be int64 or int32"),
        ([True], {}, "ids must be int64 or int32"),
        ([0], {"n": N + 64}, "packed holds"),
        ([0], {"k": 0}, "must be positive"),
        ([0], {"format": 999}, "no kernel is loaded"),
        ([0], {"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16"),
        ([0], {"packed": torch.zeros(4)}, "one-dimensional uint8"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_bad_arguments_are_refused(ids: list, changes: dict[str, object], message: str) -> None:
    format = KernelFormat(8, None, "a16", 4)
    use(format)
    weight = Weight.random(N, K, format)
    with pytest.raises((RuntimeError, ValueError), match=message):
        gather(torch.tensor(ids), weight, **changes)


def test_fake_knows_the_shape() -> None:
    format = KernelFormat(8, None, "a16", 4)
    use(format)
    weight = Weight.random(N, K, format)
    ids = torch.randint(0, N, (2, 5))
    packed, dtype = weight.packed(), torch.bfloat16
    compiled = torch.compile(
        lambda ids: gather(ids, weight, dtype, packed=packed) + 1, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(ids), gather(ids, weight, dtype) + 1)
