"""Checkpoint: the tensors of one or several safetensors files by name, mapped and not read until somebody asks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qpass.checkpoints.validate import TensorInfo, check_files, check_link, read_header, read_json, refuse

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """``infos`` describes every tensor, ``metadata`` is each file's own; :meth:`tensor` maps one. Raises CheckpointError for files that are not sound."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        self._opened: dict[Path, safe_open] = {}
        for file in self.files:
            check_link(file)
            infos, self.metadata[file] = read_header(file)
            for name, info in infos.items():
                if name in self.infos:
                    refuse(file, name, f"is in {self.infos[name].file.name} too")
                self.infos[name] = info

    @classmethod
    def of_folder(cls, folder: Path) -> Checkpoint:
        """The weights of a model's folder: one file, or the shards that its index names."""
        index = folder / INDEX
        if (folder / SINGLE).exists():
            return cls([folder / SINGLE])
        if not index.exists():
            refuse(folder, "", f"has neither {SINGLE} nor {INDEX}")
        check_link(index)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            refuse(index, "weight_map", "is not a table of tensors and files")
        names = (
            list(dict.fromkeys(weight_map.values())) if _hashable(weight_map.values()) else list(weight_map.values())
        )
        checkpoint = cls(check_files(folder, names, index))
        for tensor, name in weight_map.items():
            info = checkpoint.infos.get(tensor)
            if info is None or info.file.name != name:
                refuse(folder / name, tensor, f"is not there, though {INDEX} says so")
        return checkpoint

    @property
    def name(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)

    @cached_property
    def identity(self) -> str:
        """Another one when a file was written again: paths, sizes, times of change."""
        return identity(self.files)

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file. Raises CheckpointError for what safetensors still finds wrong in it."""
        file = self.infos[name].file
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(str(file), framework="pt")
            return self._opened[file].get_tensor(name)
        except SafetensorError as error:
            refuse(file, name, str(error))

    def __deepcopy__(self, memo: object) -> Checkpoint:
        return self  # mapped files don't change

    def part(self, module: str, suffix: str) -> TensorInfo:
        """The description of ``module.suffix``. Raises CheckpointError where it is missing."""
        info = self.infos.get(f"{module}.{suffix}")
        if info is None:
            refuse(self.name, f"{module}.{suffix}", "is missing")
        return info

    def modules_with(self, suffix: str) -> list[str]:
        """The modules that have a tensor of this name, in the files' order."""
        end = "." + suffix
        return [name.removesuffix(end) for name in self.infos if name.endswith(end)]


def identity(files: Iterable[Path]) -> str:
    """Which files these are, and as of when."""
    found = [(str(file.resolve()), file.stat()) for file in files]
    return json.dumps([(path, status.st_size, status.st_mtime_ns) for path, status in found])


def _hashable(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)
