"""GPTQ's checkpoint layout, as AutoGPTQ and GPTQModel write it (v1 and v2), and auto-round in its GPTQ packing.

qweight  int32 [K * bits / 32, N]  words down the columns: a little-endian stream of the K codes of an output
qzeros   int32 [G, N * bits / 32]  the zeros of a group's N outputs as such a stream; v1 stores zero - 1, v2 the zero
scales   float [G, N]
g_idx    int32 [K], may be absent: the group of each input; with act-order the inputs of a group lie apart
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpass.checkpoints.bits import as_bytes, unpack_bits
from qpass.checkpoints.files import Checkpoint
from qpass.checkpoints.stored import StoredLinear, divided, order_of, stored_group
from qpass.checkpoints.validate import TensorInfo, check_finite, check_number, check_tensor, refuse
from qpass.qweight import QWeight, zero_dtype
from qpass.scheme import BITS, Format

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Gptq:
    """``zero_offset`` is what the stored zeros lack; ``bits`` is None where the config lets modules differ."""

    bits: int | None
    group: int
    zero_offset: int
    source: str

    parts = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def of(cls, config: dict[str, Any], where: Path) -> Gptq:
        """Raises CheckpointError for another layout than these."""
        format = config.get("checkpoint_format") or config.get("format") or "gptq"
        if format not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
            refuse(where, "checkpoint_format", f"is {format!r}; accepted: gptq, gptq_v2")
        if config.get("pack_dtype", "int32") != "int32":
            refuse(where, "pack_dtype", f"is {config['pack_dtype']!r}; accepted: int32")
        bits = check_number(where, "bits", config.get("bits"), BITS)
        differs = bool(config.get("dynamic"))
        return cls(None if differs else bits, group_size(config, where), int(format == "gptq"), "a GPTQ checkpoint")

    def modules(self, checkpoint: Checkpoint) -> list[str]:
        return checkpoint.modules_with("qweight")

    def read(self, checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> StoredLinear:
        """``shape`` is the model's [N, K] for ``module``; everything stored must fit it. Raises CheckpointError."""
        n, k = shape
        words, zeros, scales = (checkpoint.part(module, part) for part in ("qweight", "qzeros", "scales"))
        check_tensor(words, (torch.int32,), (None, n))
        bits = words.shape[0] * 32 // k
        if bits not in BITS or words.shape[0] * 32 != k * bits or bits != (self.bits or bits):
            refuse(
                words.file,
                words.name,
                f"has {words.shape[0]} words for {k} inputs, which is not {self.bits or 'any'} bits",
            )
        group, parts, groups = groups_in(scales, self.group, k, own=self.bits is None)
        check_tensor(scales, FLOATS, (groups, n))
        if n * bits % 32:
            refuse(zeros.file, zeros.name, f"has the zeros of {n} outputs, which are no whole words of {bits} bits")
        check_tensor(zeros, (torch.int32,), (groups, n * bits // 32))
        check_finite(scales, checkpoint.tensor(scales.name))
        stored = unpack_bits(as_bytes(checkpoint.tensor(zeros.name)), bits, n)  # [G, N]
        symmetric = bool((stored == (1 << bits - 1) - self.zero_offset).all())
        order = self._order(checkpoint, module, k, group, parts, groups)
        wide = int(stored.max()) + self.zero_offset > 255  # v1 can say 256, which no byte holds
        format = Format(bits, group, symmetric, wide)

        def read() -> QWeight:
            codes = unpack_bits(as_bytes(checkpoint.tensor(words.name).t()), bits, k)
            if order is not None:
                codes = codes[:, order]
            zero = (
                unpack_bits(as_bytes(checkpoint.tensor(zeros.name)), bits, n).t().to(zero_dtype(format))
                + self.zero_offset
            )
            scale = checkpoint.tensor(scales.name).t().float()
            ours = format.groups_of(k)
            return QWeight(
                codes, divided(scale, parts, ours).contiguous(), divided(zero, parts, ours).contiguous(), format
            )

        return StoredLinear(format, shape, read, order=order, source=self.source)

    def _order(
        self, checkpoint: Checkpoint, module: str, k: int, group: int | None, parts: int, groups: int
    ) -> Tensor | None:
        info = checkpoint.infos.get(f"{module}.g_idx")
        if info is None:
            return None
        check_tensor(info, (torch.int32, torch.int64), (k,))
        return order_of(info, checkpoint.tensor(info.name), k if group is None else group * parts, groups)


def group_size(config: dict[str, Any], where: Path) -> int:
    """A config's ``group_size``, -1 for one group a channel. Raises CheckpointError."""
    group = config.get("group_size", config.get("q_group_size", 128))
    if type(group) is not int or not (group == -1 or 0 < group < 1 << 31):
        refuse(where, "group_size", f"is {group!r}; accepted: -1 or a positive number")
    return group


def groups_in(scales: TensorInfo, group: int, k: int, *, own: bool) -> tuple[int | None, int, int]:
    """A layer's group as one of ours, into how many of ours it is divided, and how many the file has.

    ``own``: the number of scales counts where it says another group than the config. Raises CheckpointError.
    """
    found, parts = stored_group(scales, group, k)
    count = 1 if found is None else -(-k // (found * parts))
    stored = scales.shape[0] if scales.shape else 0
    if own and stored != count and 0 < stored <= k and k % stored == 0:
        found, parts = stored_group(scales, k // stored, k)
        count = stored
    return found, parts, count
