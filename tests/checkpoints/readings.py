"""Files of each format that are sound, and what is done with a file that may not be: it is read, whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save

from qpass.algorithms.rtn import rtn
from qpass.checkpoints.artefact import checksum, to_tensors
from qpass.checkpoints.files import Checkpoint
from qpass.checkpoints.formats import reader_of
from qpass.checkpoints.gguf import GgufFile
from qpass.checkpoints.stored import StoredLinear
from qpass.errors import CheckpointError
from qpass.scheme import Format

SHAPE = (32, 128)
GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"


@cache
def seed(format: str) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a file with one layer [32, 128], and its quantization_config (none for GGUF)."""
    if format == "gguf":
        return _gguf(), {}
    if format == "qpass":
        return _artefact()
    common = {"bits": 4, "group_size": 32, "quant_method": format}
    name, own = {
        "gptq": ("gptqmodel-7.7.0_v2_w4_act", {"checkpoint_format": "gptq_v2"}),
        "awq": ("autoawq-0.2.9_gemm_w4", {}),
        "auto-round": ("auto_round-0.16.1_plain_w3", {"bits": 3}),
    }[format]
    return (GOLDEN / f"{name}.safetensors").read_bytes(), common | own


def _artefact() -> tuple[bytes, dict[str, Any]]:
    weight = rtn(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), Format(3, 32))
    order, divisor = torch.arange(128).flip(0), torch.ones(128)
    tensors, entry = to_tensors(StoredLinear(weight.format, SHAPE, lambda: weight, divisor, order))
    modules = {"layer": entry}
    config = {"quant_method": "qpass", "version": 1, "modules": modules, "checksum": checksum(modules)}
    return save({f"layer.{name}": tensor for name, tensor in tensors.items()}), config


def _gguf() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
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


def outcome(call: Callable[[], Any]) -> Any:
    """What a reader gives, or the words of its refusal; any other error is a bug."""
    try:
        return call()
    except CheckpointError as error:
        return str(error)


def read(format: str, path: Path) -> None:
    """Read all that ``path`` holds: a sound layer or a refusal that names the file, else AssertionError."""
    found = outcome(lambda: _gguf_layers(path) if format == "gguf" else _layer(format, path))
    if isinstance(found, str):
        assert path.name in found, found
        return
    for linear in found:
        weight = linear.read()
        assert (weight.n, weight.k) == tuple(linear.shape)
        assert int(weight.codes.max()) <= weight.format.max_code
        assert bool(torch.isfinite(weight.scales).all())
        assert linear.order is None or torch.equal(linear.order.sort().values, torch.arange(weight.k))


def _layer(format: str, path: Path) -> list[StoredLinear]:
    linear = reader_of(seed(format)[1], path).read(Checkpoint([path]), "layer", SHAPE)
    linear.read()
    return [linear]


def _gguf_layers(path: Path) -> list[StoredLinear]:
    file = GgufFile(path)
    found = []
    for name in file.tensors:
        file.floats(name)
        linear = file.linear(name)
        if linear is not None:
            linear.read()
            found.append(linear)
    return found
