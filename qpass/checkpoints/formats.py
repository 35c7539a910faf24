"""Which reader understands a checkpoint: by the ``quant_method`` of its ``quantization_config``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from qpass.checkpoints.artefact import METHOD, Artefact
from qpass.checkpoints.autoround import auto_round
from qpass.checkpoints.awq import Awq
from qpass.checkpoints.compressed_tensors import CompressedTensors
from qpass.checkpoints.files import Checkpoint
from qpass.checkpoints.gptq import Gptq
from qpass.checkpoints.stored import StoredLinear
from qpass.checkpoints.torchao import TorchAO
from qpass.checkpoints.validate import refuse


class Reader(Protocol):
    """One format, its config understood."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of a linear layer's tensors."""

    def modules(self, checkpoint: Checkpoint) -> list[str]:
        """The quantized layers that the files hold, by the names they have there."""

    def read(self, checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> StoredLinear:
        """One layer, which the model has as [N, K]. Raises CheckpointError for whatever doesn't fit."""


READERS: dict[str, Callable[[dict[str, Any], Path], Reader]] = {
    METHOD: Artefact.of,
    "gptq": Gptq.of,
    "awq": Awq.of,
    "auto-round": auto_round,
    "compressed-tensors": CompressedTensors.of,
    "torchao": TorchAO.of,
}


def reader_of(config: Any, where: Path) -> Reader:
    """The reader for a config's ``quantization_config``, found in the file ``where``. Raises CheckpointError."""
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(method, str) or method not in READERS:
        refuse(where, "quant_method", f"is {method!r}; accepted: {', '.join(READERS)}")
    return READERS[method](config, where)
