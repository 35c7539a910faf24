"""torchao's tensors in safetensors, as ``flatten_tensor_state_dict`` writes them: no pickle, the class in the file's metadata.

IntxUnpackedToInt8Tensor  ``_weight_qdata`` int8 [N, K], ``_weight_scale`` and ``_weight_zero_point`` [N, G]; 2, 3, 4 or 8 bits
Int8Tensor                ``_weight_qdata`` int8 [N, K], ``_weight_scale`` [N, 1], ``_weight_zero_point`` likewise or absent

Its packed int4 classes are layouts of CUDA kernels, and are refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpass.checkpoints.files import Checkpoint
from qpass.checkpoints.gptq import FLOATS
from qpass.checkpoints.stored import StoredLinear, divided, stored_group
from qpass.checkpoints.validate import TensorInfo, check_finite, check_tensor, refuse
from qpass.qweight import QWeight, zero_dtype
from qpass.scheme import BITS, Activation, Format

CLASSES = ("IntxUnpackedToInt8Tensor", "Int8Tensor")


@dataclass(frozen=True)
class TorchAO:
    where: Path

    parts = ("_weight_qdata", "_weight_scale", "_weight_zero_point")

    @classmethod
    def of(cls, config: dict[str, Any], where: Path) -> TorchAO:
        """What counts is in the files' metadata; the config names a recipe."""
        return cls(where)

    def modules(self, checkpoint: Checkpoint) -> list[str]:
        return checkpoint.modules_with("_weight_qdata")

    def read(self, checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> StoredLinear:
        """``shape`` is the model's [N, K] for ``module``; everything stored must fit it. Raises CheckpointError."""
        n, k = shape
        codes, scales = (checkpoint.part(module, part) for part in self.parts[:2])
        kind, data = _described(checkpoint, codes, f"{module}.weight")
        if data.get("act_pre_scale") is not None or f"{module}._weight_act_pre_scale" in checkpoint.infos:
            refuse(codes.file, module, "scales its inputs first, which qpass doesn't read")
        bits = 8 if kind == "Int8Tensor" else _bits(codes, data.get("target_dtype"))
        block = data.get("block_size")
        if not isinstance(block, list) or len(block) != 2 or block[0] != 1 or type(block[1]) is not int or block[1] < 1:
            refuse(codes.file, codes.name, f"has blocks of {block!r}; accepted: [1, a number of inputs]")
        group, parts = stored_group(scales, block[1], k)
        groups = -(-k // block[1])
        check_tensor(codes, (torch.int8,), (n, k))
        check_tensor(scales, FLOATS, (n, groups))
        check_finite(scales, checkpoint.tensor(scales.name))
        middle = 1 << bits - 1
        stored = checkpoint.tensor(codes.name)
        if int(stored.min()) < -middle or int(stored.max()) >= middle:
            refuse(codes.file, codes.name, f"holds codes that are no {bits} bits")
        zeros = checkpoint.infos.get(f"{module}.{self.parts[2]}")
        format = Format(bits, group, *_zeros_are(checkpoint, zeros, n, groups, middle))

        def read() -> QWeight:
            shifted = (checkpoint.tensor(codes.name).to(torch.int16) + middle).to(torch.uint8)
            zero = torch.zeros(n, groups) if zeros is None else checkpoint.tensor(zeros.name).float()
            scale, ours = checkpoint.tensor(scales.name).float(), format.groups_of(k)
            zero = (zero + middle).to(zero_dtype(format))
            return QWeight(
                shifted, divided(scale, parts, ours).contiguous(), divided(zero, parts, ours).contiguous(), format
            )

        acts: Activation = "a8-token" if data.get("activation_quantization") or data.get("act_quant_kwargs") else "a16"
        return StoredLinear(format, shape, read, activation=acts, source="a torchao checkpoint")


def _described(checkpoint: Checkpoint, info: TensorInfo, name: str) -> tuple[str, dict[str, Any]]:
    """The class of a tensor and its attributes, from the metadata of its file."""
    try:
        described = json.loads(checkpoint.metadata[info.file].get(name, ""))
    except (ValueError, RecursionError):
        described = None
    kind, data = (described.get("_type"), described.get("_data")) if isinstance(described, dict) else (None, None)
    if kind not in CLASSES or not isinstance(data, dict):
        refuse(info.file, name, f"is described as {kind!r}; accepted: {', '.join(CLASSES)}")
    return str(kind), data


def _bits(info: TensorInfo, target: Any) -> int:
    name = target.get("_data") if isinstance(target, dict) else target
    bits = {f"int{bits}": bits for bits in BITS}.get(name if isinstance(name, str) else "")
    if bits is None:
        refuse(info.file, info.name, f"has codes of {name!r}; accepted: {', '.join(f'int{b}' for b in BITS)}")
    return bits


def _zeros_are(checkpoint: Checkpoint, info: TensorInfo | None, n: int, groups: int, middle: int) -> tuple[bool, bool]:
    """Whether all zeros are 0, and whether some are no codes."""
    if info is None:
        return True, False
    check_tensor(info, (torch.int8, *FLOATS), (n, groups))
    zeros: Tensor = checkpoint.tensor(info.name).float()
    check_finite(info, zeros)
    if not bool(zeros.any()):
        return True, False
    return False, not bool(((zeros == zeros.round()) & (zeros >= -middle) & (zeros < middle)).all())
