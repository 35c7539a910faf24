"""AWQ's checkpoint layout "gemm", as AutoAWQ writes it, and auto-round in its AWQ packing. Always 4 bits.

qweight  int32 [K, N / 8]  eight outputs a word, in the order 0 2 4 6 1 3 5 7 from the lowest bits up
qzeros   int32 [G, N / 8]  likewise
scales   float [G, N]

The scales that AWQ moved into the layers before are in those layers' weights already.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpass.checkpoints.bits import as_bytes, unpack_bits
from qpass.checkpoints.files import Checkpoint
from qpass.checkpoints.gptq import FLOATS, group_size, groups_in
from qpass.checkpoints.stored import StoredLinear, divided
from qpass.checkpoints.validate import check_finite, check_number, check_tensor, refuse
from qpass.qweight import QWeight
from qpass.scheme import Format

BITS = 4
_PLACE_OF = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in its word each of eight consecutive outputs is."""


@dataclass(frozen=True)
class Awq:
    group: int
    source: str = "an AWQ checkpoint"

    parts = ("qweight", "qzeros", "scales")

    @classmethod
    def of(cls, config: dict[str, Any], where: Path) -> Awq:
        """Raises CheckpointError for another layout than gemm."""
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            refuse(where, "version", f"is {version!r}; accepted: gemm")
        check_number(where, "bits", config.get("bits", config.get("w_bit")), (BITS,))
        return cls(group_size(config, where))

    def modules(self, checkpoint: Checkpoint) -> list[str]:
        return checkpoint.modules_with("qweight")

    def read(self, checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> StoredLinear:
        """``shape`` is the model's [N, K] for ``module``; everything stored must fit it. Raises CheckpointError."""
        n, k = shape
        words, zeros, scales = (checkpoint.part(module, part) for part in self.parts)
        if n % 8:
            refuse(words.file, words.name, f"has {n} outputs, which are no whole words of eight")
        check_tensor(words, (torch.int32,), (k, n // 8))
        group, parts, groups = groups_in(scales, self.group, k, own=True)
        check_tensor(zeros, (torch.int32,), (groups, n // 8))
        check_tensor(scales, FLOATS, (groups, n))
        check_finite(scales, checkpoint.tensor(scales.name))
        symmetric = bool((_outputs(checkpoint.tensor(zeros.name)) == 8).all())
        format = Format(BITS, group, symmetric)

        def read() -> QWeight:
            codes = _outputs(checkpoint.tensor(words.name)).t().contiguous()
            scale = checkpoint.tensor(scales.name).t().float()
            zero, ours = _outputs(checkpoint.tensor(zeros.name)).t(), format.groups_of(k)
            return QWeight(
                codes, divided(scale, parts, ours).contiguous(), divided(zero, parts, ours).contiguous(), format
            )

        return StoredLinear(format, shape, read, source=self.source)


def _outputs(words: Tensor) -> Tensor:
    """int32 [R, N / 8] -> uint8 [R, N]."""
    stored = unpack_bits(as_bytes(words), BITS, words.shape[1] * 8)
    return stored.unflatten(1, (-1, 8))[..., _PLACE_OF].flatten(1)
