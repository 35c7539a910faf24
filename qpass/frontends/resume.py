"""Finished blocks of a long quantization in a folder, bound to the model, the data and the settings they came from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qpass.errors import CheckpointError, OptionError
from qpass.lowering.given import Given
from qpass.qweight import QWeight
from qpass.scheme import Format

VERSION = "2"


def fingerprint(model: nn.Module, settings: Mapping[str, object], batches: Iterable[tuple[tuple, dict]]) -> str:
    """A digest of every weight's bytes, of the calibration's tensors and of the settings."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([VERSION, settings], sort_keys=True, default=str).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode())
        _add(digest, tensor)
    for args, kwargs in batches:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                _add(digest, value)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)


class Finished:
    """``block-0007.safetensors`` a finished block. A file is whole or not there: it is written beside and renamed."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = Path(folder), fingerprint
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"{folder} can't be made a folder for finished blocks: {error.strerror}") from error

    def load(self, index: int, formats: Mapping[str, Format]) -> dict[str, Given] | None:
        """The weights of block ``index`` by module name; None where it isn't finished.

        Raises OptionError where the folder belongs to another model, calibration or setting, CheckpointError for a file
        that is damaged.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") != self.fingerprint:
                    raise OptionError(
                        f"{self.folder} holds blocks of another model, calibration or setting; name another folder, or "
                        "delete this one to begin anew"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {name: _given(name, format, tensors, metadata["source"]) for name, format in formats.items()}
        except (SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, OptionError):
                raise
            raise CheckpointError(f"{path} is damaged ({error}); delete it to quantize this block again") from error

    def save(self, index: int, found: Mapping[str, Given]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, given in found.items():
            weight = given.read()
            tensors |= {f"{name}.codes": weight.codes, f"{name}.scales": weight.scales, f"{name}.zeros": weight.zeros}
            if given.divisor is not None:
                tensors[f"{name}.divisor"] = given.divisor.clone()
        source = next((given.source for given in found.values()), "")
        path = self._path(index)
        beside = path.with_suffix(f".{os.getpid()}.part")
        try:
            save_file(tensors, beside, metadata={"fingerprint": self.fingerprint, "source": source})
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"


def _given(name: str, format: Format, tensors: Mapping[str, Tensor], source: str) -> Given:
    codes, scales, zeros = (tensors[f"{name}.{part}"] for part in ("codes", "scales", "zeros"))
    return Given.of(QWeight(codes, scales, zeros, format), divisor=tensors.get(f"{name}.divisor"), source=source)
