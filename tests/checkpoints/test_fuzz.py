"""Bytes changed at random: a reader answers with a layer or a CheckpointError, and nothing else ever happens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from qpass.algorithms.rtn import rtn
from qpass.checkpoints.artefact import checksum, to_tensors
from qpass.checkpoints.files import Checkpoint
from qpass.checkpoints.formats import reader_of
from qpass.checkpoints.gguf import GgufFile
from qpass.checkpoints.stored import StoredLinear
from qpass.errors import CheckpointError
from qpass.qweight import QWeight
from qpass.scheme import Format

SHAPE = (32, 128)
GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"
SETTINGS = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CHANGES = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=6)
"""Where, and what; two thirds of the places are in the header, where a change means something else."""


def outcome(call: Callable[[], Any]) -> Any:
    """What a reader gives, or the words of its refusal; any other error is a bug."""
    try:
        return call()
    except CheckpointError as error:
        return str(error)


def changed(data: bytes, changes: list[tuple[int, int]], cut: int | None) -> bytes:
    result = bytearray(data)
    for place, value in changes:
        span = len(result) if place % 3 == 0 else min(len(result), 600)
        result[place % span] = value
    return bytes(result[: len(result) - cut % len(result)] if cut is not None else result)


def _artefact() -> tuple[bytes, dict]:
    weight = rtn(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), Format(3, 32))
    order, divisor = torch.randperm(128), torch.ones(128)
    tensors, entry = to_tensors(StoredLinear(weight.format, SHAPE, lambda: weight, divisor, order))
    modules = {"layer": entry}
    config = {"quant_method": "qpass", "version": 1, "modules": modules, "checksum": checksum(modules)}
    return save({f"layer.{name}": tensor for name, tensor in tensors.items()}), config


def _golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.safetensors").read_bytes()


def seeds() -> dict[str, tuple[bytes, dict]]:
    common = {"bits": 4, "group_size": 32}
    return {
        "gptq": (
            _golden("gptqmodel-7.7.0_v2_w4_act"),
            common | {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
        ),
        "awq": (_golden("autoawq-0.2.9_gemm_w4"), common | {"quant_method": "awq"}),
        "auto-round": (_golden("auto_round-0.16.1_plain_w3"), common | {"bits": 3, "quant_method": "auto-round"}),
        "qpass": _artefact(),
    }


@pytest.mark.parametrize("format", ["gptq", "awq", "auto-round", "qpass"])
@SETTINGS
@given(changes=CHANGES, cut=st.none() | st.integers(0, 1 << 16))
def test_tensors(tmp_path: Path, format: str, changes: list[tuple[int, int]], cut: int | None) -> None:
    data, config = seeds()[format]
    path = tmp_path / "m.safetensors"
    path.unlink(missing_ok=True)  # the last one may still be mapped
    path.write_bytes(changed(data, changes, cut))

    def read() -> tuple[StoredLinear, QWeight]:
        linear = reader_of(config, path).read(Checkpoint([path]), "layer", SHAPE)
        return linear, linear.read()

    found = outcome(read)
    if isinstance(found, str):
        assert "m.safetensors" in found
        return
    linear, weight = found
    assert (weight.n, weight.k) == SHAPE
    assert int(weight.codes.max()) <= weight.format.max_code
    assert bool(torch.isfinite(weight.scales).all())
    assert linear.order is None or torch.equal(linear.order.sort().values, torch.arange(128))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=5,
)
KEYS = ("bits", "group_size", "version", "checkpoint_format", "packing_format", "config_groups", "modules", "checksum", "dynamic", "format", "data_type")  # fmt: skip


@pytest.mark.parametrize("format", ["gptq", "awq", "auto-round", "qpass", "compressed-tensors"])
@SETTINGS
@given(config=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_configs(tmp_path: Path, format: str, config: dict) -> None:
    data, own = seeds().get(format, seeds()["awq"])
    path = tmp_path / "m.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    asked = own | config | {"quant_method": format}
    reader = lambda: reader_of(asked, tmp_path / "config.json")  # noqa: E731
    found = outcome(lambda: reader().read(Checkpoint([path]), "layer", SHAPE).read())
    assert not isinstance(found, str) or "config.json" in found or "m.safetensors" in found


@pytest.fixture(scope="module")
def gguf_seed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("general.alignment", 32)
    writer.add_array("some.names", ["a", "b"])
    writer.add_array("some.numbers", [1, 2, 3])
    type = gguf.GGMLQuantizationType.Q4_0
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    writer.add_tensor("layer.weight", gguf.quants.quantize(values, type), raw_dtype=type)
    writer.add_tensor("norm.weight", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@SETTINGS
@given(changes=CHANGES, cut=st.none() | st.integers(0, 1 << 16))
def test_gguf(tmp_path: Path, gguf_seed: bytes, changes: list[tuple[int, int]], cut: int | None) -> None:
    path = tmp_path / "m.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(changed(gguf_seed, changes, cut))

    def read() -> None:
        file = GgufFile(path)
        for name in file.tensors:
            file.floats(name)
            linear = file.linear(name)
            assert linear is None or linear.read().codes.shape == linear.shape

    found = outcome(read)
    assert found is None or "m.gguf" in found


def test_the_seeds_are_sound(tmp_path: Path, gguf_seed: bytes) -> None:
    for data, config in seeds().values():
        path = tmp_path / f"{config['quant_method']}.safetensors"
        path.write_bytes(data)
        assert reader_of(json.loads(json.dumps(config)), path).read(Checkpoint([path]), "layer", SHAPE).read().n == 32
    (tmp_path / "m.gguf").write_bytes(gguf_seed)
    assert GgufFile(tmp_path / "m.gguf").linear("layer.weight").read().k == 128
