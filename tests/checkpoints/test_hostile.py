"""Files that lie: each is refused with a sentence that names file, tensor and reason, before anything native sees it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qpass.checkpoints.files import INDEX, Checkpoint
from qpass.checkpoints.formats import reader_of
from qpass.checkpoints.gguf import GgufFile
from qpass.checkpoints.validate import read_json
from qpass.errors import CheckpointError

N, K, G = 32, 64, 32


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_HEADERS = {
    "empty": (b"", "has 0 bytes, too few"),
    "header longer than the file": (raw(b"{}", length=1 << 40), "claims a header of 1099511627776 bytes"),
    "no json": (raw(b"{'a'"), "is not JSON"),
    "not utf-8": (raw(b'{"\xff": 1}'), "is not JSON"),
    "a list": (raw([]), "holds no JSON object"),
    "a deep nest": (raw(b"[" * 100_000), "is not JSON"),
    "a number of thousands of digits": (raw(b'{"a": ' + b"9" * 10_000 + b"}"), "is not JSON"),
    "a tensor twice": (raw(b'{"a": {}, "a": {}}'), "a: comes twice"),
    "metadata that is none": (raw({"__metadata__": {"a": 1}}), "__metadata__: is not a table of strings"),
    "no description": (raw({"a": 7}), "a: has no description"),
    "an unknown dtype": (raw({"a": entry("PICKLE")}, b"0000"), "a: has the dtype 'PICKLE'; accepted"),
    "a dtype that is a list": (raw({"a": entry(["F32"])}, b"0000"), "a: has the dtype"),
    "a negative shape": (raw({"a": entry(shape=[-1])}, b"0000"), r"a: has the shape \[-1\], which is none"),
    "a shape of floats": (raw({"a": entry(shape=[1.0])}, b"0000"), r"a: has the shape \[1.0\]"),
    "a shape of booleans": (raw({"a": entry(shape=[True])}, b"0000"), r"a: has the shape \[True\]"),
    "a product that overflows": (
        raw({"a": entry(shape=[1 << 33, 1 << 33], offsets=[0, 4])}, b"0000"),
        "a: has 4 bytes, where its shape .* needs 295147905179352825856",
    ),
    "ten gigabytes in a kilobyte": (
        raw({"a": entry(shape=[2_500_000_000], offsets=[0, 10_000_000_000])}, b"0" * 1000),
        "a: ends at byte 10000000000, but the file has 1000 bytes of data",
    ),
    "offsets backwards": (raw({"a": entry(offsets=[4, 0])}, b"0000"), r"a: lies at \[4, 0\]"),
    "offsets before the data": (raw({"a": entry(offsets=[-4, 0])}, b"0000"), r"a: lies at \[-4, 0\]"),
    "truncated": (raw({"a": entry(shape=[2], offsets=[0, 8])}, b"0000"), "a: ends at byte 8, but the file has 4"),
    "overlapping": (
        raw({"a": entry(shape=[2], offsets=[0, 8]), "b": entry(shape=[1], offsets=[4, 8])}, b"0" * 8),
        "b: overlaps another tensor",
    ),
    "a gap": (
        raw({"a": entry(), "b": entry(offsets=[6, 10])}, b"0" * 10),
        "b: follows 2 bytes that belong to no tensor",
    ),
    "a tail": (raw({"a": entry()}, b"0" * 9), "ends in 5 bytes that belong to no tensor"),
    "nine dimensions": (raw({"a": entry(shape=[1] * 9)}, b"0000"), "a: has the shape"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_safetensors_headers(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_HEADERS[case][0])
    with pytest.raises(CheckpointError, match=rf"model.safetensors: .*{BAD_HEADERS[case][1]}|{BAD_HEADERS[case][1]}"):
        Checkpoint([path])


def test_what_only_safetensors_refuses(tmp_path: Path) -> None:
    """Its reader is asked when a tensor is: what it says of a file is said as ours."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"a": entry()}, b"0000"))
    checkpoint = Checkpoint([path])
    path.write_bytes(b"another file by now")
    with pytest.raises(CheckpointError, match=r"model.safetensors: a: .*header"):
        checkpoint.tensor("a")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "weight_map: is not a table"),
        ([], "weight_map: is not a table"),
        ({"a": "../secret.safetensors"}, "'../secret.safetensors': is not the plain name of a file"),
        ({"a": "/etc/passwd"}, "'/etc/passwd': is not the plain name"),
        ({"a": ".."}, r"'\.\.': is not the plain name"),
        ({"a": 7}, "7: is not the plain name"),
        ({"a": ["x"]}, "is not the plain name"),
        ({"a": "gone.safetensors"}, "gone.safetensors: does not exist"),
        ({"a": "link.safetensors"}, "link.safetensors: is a link that leads out of the model's folder"),
        ({"a": "loop.safetensors"}, "loop.safetensors: does not exist"),
        ({"a": "folder.safetensors"}, "folder.safetensors: is not a file"),
        ({"b": "one.safetensors"}, f"one.safetensors: b: is not there, though {INDEX} says so"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "two.safetensors: a: is in one.safetensors too"),
    ],
)
def test_indices(tmp_path: Path, weight_map: Any, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (tmp_path / "secret.safetensors", folder / "one.safetensors", folder / "two.safetensors"):
        save_file({"a": torch.ones(2)}, path)
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.of_folder(folder)


def test_the_hubs_cache_is_made_of_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "hash")
    (snapshot / "model.safetensors").symlink_to("../../blobs/hash")
    assert Checkpoint.of_folder(snapshot).tensor("a").tolist() == [1, 1]


def test_a_huge_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="has 1073741824 bytes, too many"):
        read_json(path)


def gptq(**changes: Any) -> dict[str, torch.Tensor]:
    tensors = {
        "qweight": torch.zeros(K // 8, N, dtype=torch.int32),
        "qzeros": torch.zeros(K // G, N // 8, dtype=torch.int32),
        "scales": torch.ones(K // G, N, dtype=torch.float16),
        "g_idx": (torch.arange(K) // G).int(),
    }
    return {name: value for name, value in (tensors | changes).items() if value is not None}


def index(*values: tuple[int, int]) -> torch.Tensor:
    g_idx = (torch.arange(K) // G).int()
    for at, value in values:
        g_idx[at] = value
    return g_idx


BAD_LAYERS = {
    "a group that isn't there": (gptq(g_idx=index((3, 2))), "layer.g_idx: names group 2, where there are 2"),
    "a negative group": (gptq(g_idx=index((3, -1))), "layer.g_idx: names group -1, where there are 2"),
    "groups of uneven size": (gptq(g_idx=index((3, 1))), "layer.g_idx: gives group 0 31 columns, where it has 32"),
    "groups that are no integers": (gptq(g_idx=index().float()), "layer.g_idx: is float32, where .* int32 or int64"),
    "too few groups named": (gptq(g_idx=index()[:5].clone()), r"layer.g_idx: has shape \[5\], where \[64\] is needed"),
    "nan": (gptq(scales=torch.full((2, N), torch.nan).half()), "layer.scales: holds NaN or infinity"),
    "infinity": (gptq(scales=torch.full((2, N), torch.inf).half()), "layer.scales: holds NaN or infinity"),
    "no groups": (gptq(scales=torch.ones(0, N).half()), r"layer.scales: has shape \[0, 32\], where \[2, 32\] is needed"),
    "scales that are no floats": (gptq(scales=torch.ones(2, N).int()), "layer.scales: is int32, where .* float16"),
    "no scales": (gptq(scales=None), "layer.scales: is missing"),
    "no zeros": (gptq(qzeros=None), "layer.qzeros: is missing"),
    "codes of another type": (gptq(qweight=torch.zeros(8, N)), "layer.qweight: is float32, where .* int32"),
    "codes of another width": (gptq(qweight=torch.zeros(9, N).int()), "layer.qweight: has 9 words for 64 inputs"),
    "codes of another layer": (gptq(qweight=torch.zeros(8, 40).int()), r"layer.qweight: has shape \[8, 40\]"),
    "flat codes": (gptq(qweight=torch.zeros(8 * N).int()), r"layer.qweight: has shape \[256\]"),
    "zeros of another layer": (gptq(qzeros=torch.zeros(2, 5).int()), r"layer.qzeros: has shape \[2, 5\], where \[2, 4\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_layers(case: str, tmp_path: Path) -> None:
    tensors, message = BAD_LAYERS[case]
    save_file({f"layer.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "m.safetensors")
    reader = reader_of({"quant_method": "gptq", "bits": 4, "group_size": G}, tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=rf"m.safetensors: {message}"):
        reader.read(Checkpoint([tmp_path / "m.safetensors"]), "layer", (N, K))


BAD_CONFIGS = {
    "nothing": (None, "quant_method: is None"),
    "an unknown method": ({"quant_method": "magic"}, "quant_method: is 'magic'; accepted: qpass, gptq"),
    "a method that is a list": ({"quant_method": []}, r"quant_method: is \[\]"),
    "bits outside of the format": ({"quant_method": "gptq", "bits": 64}, "bits: is 64; accepted: 2, 3, 4, 8"),
    "bits that are a boolean": ({"quant_method": "gptq", "bits": True}, "bits: is True"),
    "a group of zero": ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size: is 0; accepted: -1 or"),
    "a negative group": ({"quant_method": "awq", "bits": 4, "group_size": -7}, "group_size: is -7"),
    "a group of text": ({"quant_method": "awq", "bits": 4, "group_size": "64"}, "group_size: is '64'"),
    "another layout": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "checkpoint_format: is 'marlin'; accepted",
    ),
    "floats": ({"quant_method": "auto-round", "bits": 4, "data_type": "fp8"}, "data_type: is 'fp8'"),
    "no groups": ({"quant_method": "compressed-tensors"}, "config_groups: is not a table"),
    "no weights": (
        {"quant_method": "compressed-tensors", "config_groups": {"g": 3}},
        "config_groups.g: has no weights",
    ),
    "a newer artefact": ({"quant_method": "qpass", "version": 99}, "version: is 99; accepted: 1"),
    "an artefact without a table": ({"quant_method": "qpass", "version": 1}, "modules: is not a table"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configs(case: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"config.json: {BAD_CONFIGS[case][1]}"):
        reader_of(BAD_CONFIGS[case][0], tmp_path / "config.json")


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


ARCHITECTURE = string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")


def gguf(entries: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3, **claims: int) -> bytes:
    head = struct.pack(
        "<4sIQQ",
        b"GGUF",
        version,
        claims.get("claimed_tensors", len(tensors)),
        claims.get("claimed_entries", len(entries)),
    )
    body = head + b"".join(entries) + b"".join(tensors)
    return body + b"\0" * (-len(body) % 32) + data


def info(name: bytes = b"a", shape: tuple[int, ...] = (32,), type: int = 8, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type, offset)


BAD_GGUF = {
    "short": (b"GGUF", "has 4 bytes, too few"),
    "letters": (b"PK\x03\x04" + b"\0" * 40, "doesn't begin with the letters GGUF"),
    "version": (gguf([], [], b"\0" * 64, version=99), "is of GGUF version 99; accepted: 2, 3"),
    "claims of entries": (gguf([], [], b"\0" * 64, claimed_entries=1 << 60), "claims 1152921504606846976 entries"),
    "claims of tensors": (gguf([ARCHITECTURE], [], b"\0" * 64, claimed_tensors=1 << 60), "claims 1152921504606846976 tensors"),
    "a name that never ends": (gguf([struct.pack("<Q", 1 << 62)], [], b"\0" * 64), "ends in the middle of its header"),
    "an array that never ends": (
        gguf([string(b"k") + struct.pack("<IIQ", 9, 4, 1 << 61)], [], b"\0" * 64),
        "ends in the middle of its header",
    ),
    "an unknown value": (gguf([string(b"k") + struct.pack("<I", 77)], [], b"\0" * 64), "metadata value of the unknown type 77"),
    "a key twice": (gguf([ARCHITECTURE, ARCHITECTURE], [], b"\0" * 64), "general.architecture: comes twice"),
    "a tensor twice": (gguf([ARCHITECTURE], [info(), info(offset=64)], b"\0" * 128), "a: comes twice"),
    "an unknown type": (gguf([ARCHITECTURE], [info(type=99)], b"\0" * 64), "a: has the type 99; accepted: F32"),
    "a broken row": (gguf([ARCHITECTURE], [info(shape=(33,))], b"\0" * 64), "a: has rows of 33, which are no whole blocks"),
    "no rows": (gguf([ARCHITECTURE], [info(shape=(32, 0))], b"\0" * 64), r"a: has the shape \[0, 32\]"),
    "a product that overflows": (
        gguf([ARCHITECTURE], [info(shape=(1 << 40, 1 << 40))], b"\0" * 64), "a: ends behind the file's end",
    ),
    "behind the end": (gguf([ARCHITECTURE], [info(offset=1 << 50)], b"\0" * 64), "a: ends behind the file's end"),
    "overlapping": (gguf([ARCHITECTURE], [info(), info(b"b", offset=2)], b"\0" * 64), "b: overlaps another tensor"),
    "nine dimensions": (gguf([ARCHITECTURE], [info(shape=(1,) * 9)], b"\0" * 64), "a: has 9 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_GGUF)
def test_gguf(case: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(BAD_GGUF[case][0])
    with pytest.raises(CheckpointError, match=rf"m.gguf: .*{BAD_GGUF[case][1]}|m.gguf: {BAD_GGUF[case][1]}"):
        GgufFile(path)


def test_gguf_scales_that_are_nan(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([ARCHITECTURE], [info(shape=(32, 1))], struct.pack("<e", float("nan")) + b"\0" * 32))
    linear = GgufFile(path).linear("a")
    assert linear is not None
    with pytest.raises(CheckpointError, match=r"m.gguf: a: holds scales that are NaN or infinity"):
        linear.read()
