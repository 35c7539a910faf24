"""Released weights give their memory back, also where they are views of a mapped file."""

from __future__ import annotations

import pathlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qpass.errors import ReleasedWeightError
from qpass.lowering.released import release, released_name, return_memory, without_values
from qpass.measure.memory import resident_bytes

MEGABYTES = 64


def test_a_view_of_a_mapped_file_leaves_memory_and_its_neighbour_stays(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "weights.bin"
    count = MEGABYTES << 18  # float32
    storage = torch.arange(2 * count, dtype=torch.float32)
    storage.numpy().tofile(path)
    del storage
    mapped = torch.from_file(str(path), shared=False, size=2 * count, dtype=torch.float32)
    gone, kept = nn.Parameter(mapped[:count].view(-1, 64), False), mapped[count:]
    expected = float(kept.double().sum()) + float(gone.detach().double().sum()) * 0
    before = resident_bytes()
    assert release(gone, "a.weight") == 4 * count
    assert before - resident_bytes() > 0.9 * MEGABYTES * 2**20
    assert float(kept.double().sum()) == expected
    assert float(mapped[5]) == 5.0  # only the pages were dropped: a read brings them back


def test_heap_memory_leaves_too() -> None:
    parameter = nn.Parameter(torch.ones(MEGABYTES << 12, 64), False)
    return_memory()  # what others freed before is not counted
    before = resident_bytes()
    release(parameter, "b.weight")
    return_memory()  # as every caller does: a block inside of a fragmented heap stays resident until then
    assert before - resident_bytes() > 0.9 * MEGABYTES * 2**20


def test_what_may_be_asked(tmp_path: pathlib.Path) -> None:
    parameter = nn.Parameter(torch.ones(4, 8))
    release(parameter, "c.weight")
    assert release(parameter, "c.weight") == 0
    assert released_name(parameter) == "c.weight"
    assert released_name(nn.Parameter(torch.ones(1))) is None
    assert (parameter.shape, parameter.dtype, parameter.stride()) == ((4, 8), torch.float32, (8, 1))
    for use in (
        lambda: parameter.sum(),
        lambda: parameter[0],
        lambda: parameter.tolist(),
        lambda: save_file({"w": parameter}, tmp_path / "x"),
    ):
        with pytest.raises(ReleasedWeightError, match=r"c\.weight"):
            use()


def test_who_gets_past_the_class_reads_nan() -> None:
    parameter = without_values((3000, 1000), torch.bfloat16, "d.weight")  # several runs of the mapping
    with torch._C.DisableTorchFunctionSubclass():
        assert bool(parameter.isnan().all())
        assert parameter.sum().isnan()
    with pytest.raises(ReleasedWeightError, match=r"d\.weight"):
        parameter.sum()
