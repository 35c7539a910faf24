"""Which stored layer is which of the model's, and whether the files have all that the model needs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qpass.checkpoints.files import Checkpoint
from qpass.checkpoints.formats import Reader
from qpass.checkpoints.stored import StoredLinear
from qpass.checkpoints.validate import refuse


def read_layers(
    model: nn.Module, checkpoint: Checkpoint, reader: Reader, conversions: list[Any]
) -> dict[str, StoredLinear]:
    """Every stored layer by the model's name of its weight, each checked against the model's shape.

    Raises CheckpointError for a layer that the model doesn't have, or has in another shape, and for weights that the
    files lack: transformers would fill them with random numbers of the size that the config claims.
    """
    names = _Names(model, conversions)
    layers: dict[str, StoredLinear] = {}
    files = hashlib.sha256(f"{checkpoint.identity} {reader!r}".encode()).hexdigest()
    for module in reader.modules(checkpoint):
        weight = names.of(f"{module}.weight")
        target = names.shapes.get(weight)
        if target is None or not isinstance(_module(model, weight), nn.Linear):
            refuse(checkpoint.name, module, f"is no linear layer of {type(model).__name__}")
        if weight in layers:
            refuse(checkpoint.name, module, "is there twice")
        layer = reader.read(checkpoint, module, (target[0], target[1]))
        layers[weight] = replace(layer, origin=f"{files} {module}")
    _check_rest(checkpoint, names, layers, reader)
    return layers


class _Names:
    """The model's tensors, and what transformers makes of a file's names."""

    def __init__(self, model: Any, conversions: list[Any]) -> None:
        state = model.state_dict()
        self.state = state
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self.prefix = model.base_model_prefix
        tied = getattr(model, "all_tied_weights_keys", {})
        buffers = {name for name, _ in model.named_buffers()}
        ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or []
        self.needed = {name for name in state if name not in tied and name not in buffers} if not ignored else set()

    def of(self, name: str) -> str:
        return self.converted(name)[0]

    def converted(self, name: str) -> tuple[str, bool]:
        """The model's name, and whether several of the file's tensors make it."""
        renamed, source = rename_source_key(name, self.renamings, self.converters, self.prefix, self.state)
        return renamed, source is not None


def _check_rest(checkpoint: Checkpoint, names: _Names, layers: dict[str, StoredLinear], reader: Reader) -> None:
    found = set(layers)
    for name, info in checkpoint.infos.items():
        target, made = names.converted(name)
        if target in layers:
            continue
        found.add(target)
        wanted = names.shapes.get(target)
        if not made and wanted is not None and wanted != info.shape:
            refuse(info.file, name, f"has shape {list(info.shape)}, where the model has {list(wanted)}")
    missing = sorted(names.needed - found)
    if missing:
        refuse(
            checkpoint.name, missing[0], f"is missing, with {len(missing) - 1} others" if missing[1:] else "is missing"
        )


def _module(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])
