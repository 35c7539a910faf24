"""Bytes changed at random: a reader answers with a layer or a CheckpointError, and nothing else ever happens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qpass.checkpoints.files import Checkpoint
from qpass.checkpoints.formats import reader_of
from qpass.checkpoints.gguf import GgufFile
from tests.checkpoints.readings import SHAPE, outcome, read, seed

FORMATS = ("gptq", "awq", "auto-round", "qpass", "gguf")
SETTINGS = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CHANGES = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=6)
"""Where, and what; two thirds of the places are in the header, where a change means something else."""


def changed(data: bytes, changes: list[tuple[int, int]], cut: int | None) -> bytes:
    result = bytearray(data)
    for place, value in changes:
        span = len(result) if place % 3 == 0 else min(len(result), 600)
        result[place % span] = value
    return bytes(result[: len(result) - cut % len(result)] if cut is not None else result)


@pytest.mark.parametrize("format", FORMATS)
@SETTINGS
@given(changes=CHANGES, cut=st.none() | st.integers(0, 1 << 16))
def test_bytes(tmp_path: Path, format: str, changes: list[tuple[int, int]], cut: int | None) -> None:
    path = tmp_path / f"m.{'gguf' if format == 'gguf' else 'safetensors'}"
    path.unlink(missing_ok=True)  # the last one may still be mapped
    path.write_bytes(changed(seed(format)[0], changes, cut))
    read(format, path)


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
    data, own = seed("awq" if format == "compressed-tensors" else format)
    path = tmp_path / "m.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    asked = own | config | {"quant_method": format}
    reader = lambda: reader_of(asked, tmp_path / "config.json")  # noqa: E731
    found = outcome(lambda: reader().read(Checkpoint([path]), "layer", SHAPE).read())
    assert not isinstance(found, str) or "config.json" in found or "m.safetensors" in found


@pytest.mark.parametrize("format", FORMATS)
def test_the_seeds_are_sound(tmp_path: Path, format: str) -> None:
    data, config = seed(format)
    path = tmp_path / "m"
    path.write_bytes(data)
    if format == "gguf":
        assert GgufFile(path).linear("layer.weight").read().k == 128
    else:
        assert reader_of(json.loads(json.dumps(config)), path).read(Checkpoint([path]), "layer", SHAPE).read().n == 32


@pytest.mark.parametrize("format", FORMATS)
def test_guided_by_coverage(tmp_path: Path, format: str) -> None:
    """Twelve seconds a format: a minute in all."""
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python")
    run = subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.fuzz_reader", format, "-max_total_time=12", f"-artifact_prefix={tmp_path}/"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    runs = re.search(r"Done (\d+) runs", run.stderr)
    assert runs is not None, run.stderr[-1000:]
    assert int(runs[1]) > 100, run.stderr[-1000:]
