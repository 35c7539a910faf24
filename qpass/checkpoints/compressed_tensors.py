"""compressed-tensors, the format of llm-compressor and vLLM: "pack-quantized" (2, 3, 4 or 8 bits) and "int-quantized" (int8).

pack-quantized  weight_packed      int32 [N, ceil(K * bits / 32)]: code + 2**(bits - 1) as a little-endian stream a row
                weight_scale       float [N, G]; weight_shape int64 [2]
                weight_zero_point  int32 [ceil(N * bits / 32), G]: as the weight, but streams down the columns; or absent
                weight_g_idx       int32 [K], the group of each input; or absent
int-quantized   weight             int8 [N, K]; weight_scale float [N, G]; weight_zero_point int8 [N, G], or absent
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpass.checkpoints.bits import as_bytes, unpack_bits
from qpass.checkpoints.files import Checkpoint
from qpass.checkpoints.gptq import FLOATS
from qpass.checkpoints.stored import StoredLinear, divided, order_of, stored_group
from qpass.checkpoints.validate import TensorInfo, check_finite, check_number, check_tensor, refuse
from qpass.qweight import QWeight
from qpass.scheme import BITS, Activation, Format

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")


@dataclass(frozen=True)
class Group:
    """One of a config's groups of layers."""

    bits: int
    symmetric: bool
    group: int  # -1: one a channel
    activation: Activation | None
    note: str = ""


@dataclass(frozen=True)
class CompressedTensors:
    groups: tuple[Group, ...]

    parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight")

    @classmethod
    def of(cls, config: dict[str, Any], where: Path) -> CompressedTensors:
        """Raises CheckpointError for another format than these, for floats, sparsity and transforms."""
        table = config.get("config_groups")
        if not isinstance(table, dict) or not table:
            refuse(where, "config_groups", "is not a table of groups")
        for key in ("sparsity_config", "transform_config"):
            value = config.get(key)
            if isinstance(value, dict) and value.get("format", "some") != "dense" and value != {}:
                refuse(where, key, "asks for what qpass doesn't have; accepted: none")
        return cls(tuple(_group(name, entry, config.get("format"), where) for name, entry in table.items()))

    def modules(self, checkpoint: Checkpoint) -> list[str]:
        return checkpoint.modules_with("weight_scale")

    def read(self, checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> StoredLinear:
        """``shape`` is the model's [N, K] for ``module``; everything stored must fit it. Raises CheckpointError."""
        n, k = shape
        scales = checkpoint.part(module, "weight_scale")
        zeros, g_idx = (checkpoint.infos.get(f"{module}.{part}") for part in ("weight_zero_point", "weight_g_idx"))
        packed = checkpoint.infos.get(f"{module}.weight_packed")
        codes = packed or checkpoint.part(module, "weight")
        group = self._group_of(codes, scales, n, k, packed is not None)
        bits, (length, parts) = group.bits, stored_group(scales, group.group, k)
        groups = 1 if length is None else -(-k // (length * parts))
        if packed is not None:
            check_tensor(packed, (torch.int32,), (n, -(-k * bits // 32)))
            stated = checkpoint.part(module, "weight_shape")
            check_tensor(stated, (torch.int64, torch.int32), (2,))
            if checkpoint.tensor(stated.name).tolist() != [n, k]:
                refuse(
                    stated.file,
                    stated.name,
                    f"says {checkpoint.tensor(stated.name).tolist()}, where the model has {[n, k]}",
                )
        else:
            check_tensor(codes, (torch.int8,), (n, k))
        tensor_wide = packed is None and scales.shape in ((), (1,), (1, 1))
        if not tensor_wide and scales.shape != (n,):
            check_tensor(scales, FLOATS, (n, groups))
        check_tensor(scales, FLOATS, scales.shape)
        check_finite(scales, checkpoint.tensor(scales.name))
        if zeros is not None:
            words = packed is not None
            check_tensor(zeros, (torch.int32 if words else torch.int8,), (-(-n * bits // 32) if words else n, groups))
        elif not group.symmetric:
            checkpoint.part(module, "weight_zero_point")  # says that it is missing
        order = None
        if g_idx is not None:
            check_tensor(g_idx, (torch.int32, torch.int64), (k,))
            order = order_of(g_idx, checkpoint.tensor(g_idx.name), k if length is None else length * parts, groups)
        format = Format(bits, length, zeros is None)

        def read() -> QWeight:
            if packed is not None:
                values = unpack_bits(as_bytes(checkpoint.tensor(packed.name)), bits, k)
            else:
                values = _unsigned(checkpoint.tensor(codes.name))
            values = values if order is None else values[:, order]
            scale = checkpoint.tensor(scales.name).float().reshape(-1, groups).expand(n, groups)
            zero = _zeros(checkpoint, zeros, bits, n, groups)
            ours = format.groups_of(k)
            return QWeight(
                values, divided(scale, parts, ours).contiguous(), divided(zero, parts, ours).contiguous(), format
            )

        source = f"a compressed-tensors checkpoint{group.note}"
        return StoredLinear(format, shape, read, order=order, activation=group.activation, source=source)

    def _group_of(self, codes: TensorInfo, scales: TensorInfo, n: int, k: int, packed: bool) -> Group:
        """The config's group that a layer's shapes fit. Raises CheckpointError where none does, or two that differ."""

        def fits(group: Group) -> bool:
            count = 1 if group.group == -1 else -(-k // group.group)
            width = -(-k * group.bits // 32) if packed else k
            wide = scales.numel_is_one if count == 1 else False
            return (
                codes.shape == (n, width)
                and (scales.shape in ((n, count), (n,)) or wide)
                and (packed or group.bits == 8)
            )

        found = {group for group in self.groups if fits(group)}
        if not found:
            refuse(
                codes.file,
                codes.name,
                f"has shape {list(codes.shape)} with scales {list(scales.shape)}, which fits no group of the config for [{n}, {k}]",
            )
        if len(found) > 1:
            refuse(codes.file, codes.name, "fits several groups of the config that differ")
        return found.pop()


def _group(name: str, entry: Any, format: Any, where: Path) -> Group:
    key = f"config_groups.{name}"
    weights = entry.get("weights") if isinstance(entry, dict) else None
    if not isinstance(weights, dict):
        refuse(where, key, "has no weights")
    format = entry.get("format") or format
    if format not in FORMATS:
        refuse(where, key, f"has the format {format!r}; accepted: {', '.join(FORMATS)}")
    if weights.get("type", "int") != "int" or weights.get("dynamic"):
        refuse(where, key, "has weights that are no stored integers")
    bits = check_number(where, f"{key}.num_bits", weights.get("num_bits"), BITS)
    strategy, group = weights.get("strategy"), weights.get("group_size")
    strategy = strategy or ("group" if group and group > 0 else "channel")
    if strategy not in ("group", "channel", "tensor") or (strategy == "group") != (type(group) is int and group > 0):
        refuse(where, key, f"has strategy {strategy!r} with groups of {group!r}; accepted: group, channel, tensor")
    length = int(group) if strategy == "group" and group else -1
    return Group(
        bits, bool(weights.get("symmetric", True)), length, *_activation(entry.get("input_activations"), key, where)
    )


def _activation(inputs: Any, key: str, where: Path) -> tuple[Activation | None, str]:
    if not inputs:
        return "a16", ""
    if not isinstance(inputs, dict) or inputs.get("type", "int") != "int" or inputs.get("num_bits") != 8:
        refuse(where, f"{key}.input_activations", "are not int8")
    exact = inputs.get("dynamic") and inputs.get("strategy") == "token" and inputs.get("symmetric", True)
    return "a8-token", "" if exact else ", its activations scaled a token at a time instead of as calibrated"


def _unsigned(values: Tensor) -> Tensor:
    """int8 -> uint8, 128 more."""
    return values.view(torch.uint8) ^ 128


def _zeros(checkpoint: Checkpoint, info: TensorInfo | None, bits: int, n: int, groups: int) -> Tensor:
    if info is None:
        return torch.full((n, groups), 1 << bits - 1, dtype=torch.uint8)
    stored = checkpoint.tensor(info.name)
    if stored.dtype == torch.int8:
        return _unsigned(stored)
    return unpack_bits(as_bytes(stored.t()), bits, n).t()
