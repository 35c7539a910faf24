"""Our own artefact: quantized weights as dense codes in safetensors, described in config.json. docs/artefact.md is its specification."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from qpass.checkpoints.bits import dense_bytes, pack_bits, unpack_bits
from qpass.checkpoints.files import Checkpoint
from qpass.checkpoints.stored import StoredLinear
from qpass.checkpoints.validate import check_finite, check_number, check_tensor, refuse
from qpass.qweight import QWeight, multiples, zero_dtype
from qpass.scheme import BITS, GROUPS, Activation, Format

METHOD = "qpass"
VERSION = 1
CODES, SCALES, ZEROS, DIVISOR, ORDER = (f"qpass_{part}" for part in ("codes", "scales", "zeros", "divisor", "order"))
ACTIVATIONS = (None, *get_args(Activation))


def to_tensors(linear: StoredLinear) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one layer by the last part of their names, and its entry in the config's ``modules``."""
    weight, format = linear.read(), linear.format
    tensors = {CODES: pack_bits(weight.codes, format.bits), SCALES: compact_scales(weight.scales)}
    if not format.symmetric:
        tensors[ZEROS] = weight.zeros.contiguous()
    if linear.divisor is not None:
        tensors[DIVISOR] = linear.divisor.contiguous()
    if linear.order is not None:
        tensors[ORDER] = linear.order.to(torch.int32)
    entry = {
        "bits": format.bits,
        "group": format.group,
        "symmetric": format.symmetric,
        "float_zeros": format.float_zeros,
        **({"integer_scales": True} if format.integer_scales else {}),
        "activation": linear.activation,
        "source": linear.source,
        "crc32": crc32(tensors),
    }
    return tensors, entry


def compact_scales(scales: Tensor) -> Tensor:
    """fp16 where that loses nothing, fp32 otherwise."""
    half = scales.half()
    return half if torch.equal(half.float(), scales) else scales.contiguous()


def crc32(tensors: Mapping[str, Tensor]) -> int:
    """Of the layer's bytes: codes, scales, zeros, divisor, order, in this order, those that are there."""
    value = 0
    for name in (CODES, SCALES, ZEROS, DIVISOR, ORDER):
        if name in tensors:
            value = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return value


def checksum(modules: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the whole ``modules`` table, the layers' own checksums in it."""
    text = json.dumps(modules, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Artefact:
    """The reader of an artefact."""

    entries: Mapping[str, Mapping[str, Any]]
    where: Path

    parts = (CODES, SCALES, ZEROS, DIVISOR, ORDER)

    @classmethod
    def of(cls, config: dict[str, Any], where: Path) -> Artefact:
        """Raises CheckpointError for a version that is not ours and for a table that is not what was written."""
        if config.get("version") != VERSION:
            refuse(where, "version", f"is {config.get('version')!r}; accepted: {VERSION}")
        modules = config.get("modules")
        if not isinstance(modules, dict) or not all(isinstance(entry, dict) for entry in modules.values()):
            refuse(where, "modules", "is not a table of layers")
        if config.get("checksum") != checksum(modules):
            refuse(where, "checksum", "doesn't fit the table of modules: the config was changed or cut")
        return cls(modules, where)

    def modules(self, checkpoint: Checkpoint) -> list[str]:
        for module in checkpoint.modules_with(CODES):
            if module not in self.entries:
                refuse(self.where, f"modules.{module}", f"is missing, though {checkpoint.name} has its codes")
        return list(self.entries)

    def read(self, checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> StoredLinear:
        """``shape`` is the model's [N, K] for ``module``; everything stored must fit it. Raises CheckpointError."""
        n, k = shape
        entry, format = self.entries[module], self._format(module)
        codes, scales = checkpoint.part(module, CODES), checkpoint.part(module, SCALES)
        groups = format.groups_of(k)
        check_tensor(codes, (torch.uint8,), (n, dense_bytes(k, format.bits)))
        check_tensor(scales, (torch.float16, torch.float32), (n, groups))
        check_finite(scales, checkpoint.tensor(scales.name))
        zeros = None if format.symmetric else checkpoint.part(module, ZEROS)
        if zeros is not None:
            check_tensor(zeros, (zero_dtype(format),), (n, groups))
            check_finite(zeros, checkpoint.tensor(zeros.name))
        divisor, order = self._input(checkpoint, module, k)
        activation = entry.get("activation")
        if activation not in ACTIVATIONS:
            refuse(self.where, f"modules.{module}.activation", f"is {activation!r}; accepted: {ACTIVATIONS[1:]}")
        sound = False

        def read() -> QWeight:
            nonlocal sound
            if not sound and crc32(self._tensors(checkpoint, module)) != entry.get("crc32"):
                refuse(codes.file, codes.name, "doesn't fit its checksum: the file was damaged")
            sound = True
            stored = checkpoint.tensor(codes.name)
            scale = checkpoint.tensor(scales.name).float()
            zero = (
                torch.full((n, groups), 1 << format.bits - 1, dtype=zero_dtype(format))
                if zeros is None
                else checkpoint.tensor(zeros.name)
            )
            if format.integer_scales:
                try:
                    multiples(scale, zero, format.bits)
                except ValueError as error:
                    refuse(scales.file, scales.name, str(error))
            return QWeight(unpack_bits(stored, format.bits, k), scale, zero, format)

        source = entry.get("source")
        return StoredLinear(format, shape, read, divisor, order, activation, source if isinstance(source, str) else "")

    def _tensors(self, checkpoint: Checkpoint, module: str) -> dict[str, Tensor]:
        names = {part: f"{module}.{part}" for part in self.parts}
        return {part: checkpoint.tensor(name) for part, name in names.items() if name in checkpoint.infos}

    def _format(self, module: str) -> Format:
        entry, key = self.entries[module], f"modules.{module}"
        bits = check_number(self.where, f"{key}.bits", entry.get("bits"), BITS)
        group = entry.get("group")
        if group is not None:
            check_number(self.where, f"{key}.group", group, GROUPS)
        for flag in ("symmetric", "float_zeros"):
            if not isinstance(entry.get(flag), bool):
                refuse(self.where, f"{key}.{flag}", f"is {entry.get(flag)!r}; accepted: true, false")
        integer_scales = entry.get("integer_scales", False)
        if integer_scales not in (True, False) or (
            integer_scales and (group is None or bits == 8 or entry["float_zeros"])
        ):
            refuse(
                self.where,
                f"{key}.integer_scales",
                f"is {integer_scales!r}; accepted: false, or true in groups of 2 to 4 bits",
            )
        return Format(bits, group, entry["symmetric"], entry["float_zeros"], bool(integer_scales))

    def _input(self, checkpoint: Checkpoint, module: str, k: int) -> tuple[Tensor | None, Tensor | None]:
        """Divisor and order of a layer's input. Raises CheckpointError for what divides by zero or is no permutation."""
        divisor = order = None
        info = checkpoint.infos.get(f"{module}.{DIVISOR}")
        if info is not None:
            check_tensor(info, (torch.float32,), (k,))
            divisor = checkpoint.tensor(info.name)
            check_finite(info, divisor)
            if not bool((divisor > 0).all()):
                refuse(info.file, info.name, "holds a divisor that is not positive")
        info = checkpoint.infos.get(f"{module}.{ORDER}")
        if info is not None:
            check_tensor(info, (torch.int32,), (k,))
            order = checkpoint.tensor(info.name).long()
            if not torch.equal(order.sort().values, torch.arange(k)):
                refuse(info.file, info.name, f"is no permutation of 0 to {k - 1}")
        return divisor, order
