"""GGUF, llama.cpp's file: its header, checked, and its blocks as codes.

A quantized tensor is rows of blocks, each with its own scales; the layouts are those of ggml's ``block_q4_0`` and so on.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpass.checkpoints.files import identity
from qpass.checkpoints.gguf_blocks import BLOCKS, Blocks
from qpass.checkpoints.stored import StoredLinear
from qpass.checkpoints.validate import refuse
from qpass.qweight import QWeight

FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of metadata values, by their type
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """``shape`` in torch's order; ``begin`` counts from the file's first byte."""

    name: str
    shape: tuple[int, ...]
    type: int
    begin: int
    size: int


class GgufFile:
    """A GGUF file whose header was checked: every tensor lies inside of it, apart from the others.

    Raises CheckpointError for a truncated or overlapping file, for sizes that don't fit, and for unknown types.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        if size < 24:
            refuse(path, "", f"has {size} bytes, too few for a GGUF file")
        self._bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)  # mapped, not read
        reader = _Reader(path, self._bytes.numpy().data)
        if reader.take(4) != b"GGUF":
            refuse(path, "", "is not a GGUF file: it doesn't begin with the letters GGUF")
        version, tensors, entries = reader.numbers("<IQQ")
        if version not in VERSIONS:
            refuse(path, "", f"is of GGUF version {version}; accepted: {', '.join(map(str, VERSIONS))}")
        self.metadata: dict[str, Any] = {}
        for _ in range(reader.count(entries, 13, "entries")):
            key = reader.string()
            if key in self.metadata:
                refuse(path, key, "comes twice")
            self.metadata[key] = reader.value()
        infos = [_tensor_info(reader) for _ in range(reader.count(tensors, 32, "tensors"))]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & alignment - 1:
            refuse(path, "general.alignment", f"is {alignment!r}; accepted: a power of two")
        data = -(-reader.at // alignment) * alignment
        self.tensors = {name: self._placed(name, shape, kind, data + offset) for name, shape, kind, offset in infos}
        if len(self.tensors) != len(infos):
            names = [info[0] for info in infos]
            refuse(path, next(name for name in names if names.count(name) > 1), "comes twice")
        at = data
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.begin):
            if tensor.begin < at or tensor.begin + tensor.size > size:
                refuse(
                    path, tensor.name, "overlaps another tensor" if tensor.begin < at else "ends behind the file's end"
                )
            at = tensor.begin + tensor.size

    @property
    def architecture(self) -> str:
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            refuse(self.path, "general.architecture", "is missing")
        return name

    def bytes_of(self, name: str) -> Tensor:
        """A tensor's bytes [size], a view of the mapped file."""
        tensor = self.tensors[name]
        return self._bytes[tensor.begin : tensor.begin + tensor.size]

    def floats(self, name: str) -> Tensor | None:
        """The values of a tensor that is not quantized; None for one that is."""
        tensor = self.tensors[name]
        dtype = FLOATS.get(tensor.type)
        return None if dtype is None else self.bytes_of(name).clone().view(dtype).view(tensor.shape)

    def linear(self, name: str, rows: Tensor | None = None) -> StoredLinear | None:
        """A quantized matrix [N, K] as codes, its rows taken in the order ``rows`` [N]; None where our formats can't hold it."""
        tensor, blocks = self.tensors[name], BLOCKS.get(self.tensors[name].type)
        if blocks is None or blocks.split is None or len(tensor.shape) != 2:
            return None
        n, k = tensor.shape
        split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] = blocks.split

        def read() -> QWeight:
            raw = self.bytes_of(name).view(n, -1)
            raw = raw if rows is None else raw[rows]
            codes, scales, zeros = split(raw.reshape(-1, blocks.size))
            if not bool(torch.isfinite(scales).all()) or not bool(torch.isfinite(zeros.float()).all()):
                refuse(self.path, name, "holds scales that are NaN or infinity")
            return QWeight(codes.view(n, k), scales.view(n, -1), zeros.view(n, -1), blocks.format)

        order = "" if rows is None else hashlib.sha256(rows.numpy().tobytes()).hexdigest()
        origin = f"{identity([self.path])} {name} {order}"
        return StoredLinear(blocks.format, (n, k), read, source=f"GGUF, {blocks.name}", origin=origin)

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> GgufTensor:
        count = prod(shape)  # Python's integers don't overflow
        if kind in FLOATS:
            return GgufTensor(name, shape, kind, begin, count * FLOATS[kind].itemsize)
        blocks: Blocks | None = BLOCKS.get(kind)
        if blocks is None:
            known = ", ".join(["F32", "F16", "BF16", *(b.name for b in BLOCKS.values())])
            refuse(self.path, name, f"has the type {kind}; accepted: {known}")
        if shape[-1] % blocks.length:
            refuse(self.path, name, f"has rows of {shape[-1]}, which are no whole blocks of {blocks.length}")
        return GgufTensor(name, shape, kind, begin, count // blocks.length * blocks.size)


def _tensor_info(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name = reader.string()
    (dimensions,) = reader.numbers("<I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        refuse(reader.path, name, f"has {dimensions} dimensions")
    shape = tuple(reversed(reader.numbers(f"<{dimensions}Q")))  # ggml's first dimension is the fastest
    kind, offset = reader.numbers("<IQ")
    if 0 in shape:
        refuse(reader.path, name, f"has the shape {list(shape)}")
    return name, shape, kind, offset


class _Reader:
    """Goes through a header and never leaves the file."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, length: int) -> bytes:
        if length > len(self.data) - self.at:
            refuse(self.path, "", "ends in the middle of its header")
        self.at += length
        return bytes(self.data[self.at - length : self.at])

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def count(self, claimed: int, least: int, what: str) -> int:
        """A number of things that take at least so many bytes each."""
        if claimed * least > len(self.data) - self.at:
            refuse(self.path, "", f"claims {claimed} {what}, more than it has bytes for")
        return claimed

    def string(self) -> str:
        (length,) = self.numbers("<Q")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            refuse(self.path, "", "has a name that is not UTF-8")

    def value(self) -> Any:
        """One metadata value; arrays are passed over."""
        (kind,) = self.numbers("<I")
        if kind == _STRING:
            return self.string()
        if kind in _WIDTHS:
            raw = self.take(_WIDTHS[kind])
            return int.from_bytes(raw, "little") if kind not in (6, 12) else None
        if kind != _ARRAY:
            refuse(self.path, "", f"has a metadata value of the unknown type {kind}")
        element, length = self.numbers("<IQ")
        if element in _WIDTHS:
            self.take(length * _WIDTHS[element])
        elif element == _STRING:
            for _ in range(self.count(length, 8, "strings")):
                self.take(self.numbers("<Q")[0])
        else:
            refuse(self.path, "", f"has a metadata array of the unknown type {element}")
        return None
