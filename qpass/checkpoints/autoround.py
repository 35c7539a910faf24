"""auto-round's own export: GPTQ's or AWQ's tensors under a config of its own (``packing_format``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qpass.checkpoints.awq import Awq
from qpass.checkpoints.gptq import Gptq, group_size
from qpass.checkpoints.validate import check_number, refuse
from qpass.scheme import BITS

SOURCE = "an auto-round checkpoint"


def auto_round(config: dict[str, Any], where: Path) -> Gptq | Awq:
    """The reader of one such checkpoint. Raises CheckpointError for floats, and for activations that are quantized."""
    packing = config.get("packing_format", "auto_round:auto_gptq")
    if not isinstance(packing, str) or not packing.startswith("auto_round"):
        refuse(
            where, "packing_format", f"is {packing!r}; accepted: auto_round, auto_round:auto_gptq, auto_round:auto_awq"
        )
    if config.get("data_type", "int") != "int":
        refuse(where, "data_type", f"is {config['data_type']!r}; accepted: int")
    if config.get("act_bits") not in (None, 16, 32):
        refuse(where, "act_bits", f"is {config['act_bits']!r}; accepted: 16")
    if "awq" in packing:
        return replace(Awq.of({**config, "version": "gemm"}, where), source=SOURCE)
    bits = check_number(where, "bits", config.get("bits"), BITS)
    # Only its packing for AutoGPTQ's kernels stores zero - 1; its own keeps the zero.
    offset = int("gptq" in packing and "gptqmodel" not in packing)
    return Gptq(None if config.get("extra_config") else bits, group_size(config, where), offset, SOURCE)
