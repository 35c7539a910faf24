"""transformers' side of the artefact: ``from_pretrained`` quantizes as it reads, ``save_pretrained`` writes, ``from_pretrained`` reads back.

    AutoModelForCausalLM.from_pretrained(path, quantization_config=qpass.QPassConfig(scheme="w4a16-g128"))

Importing qpass registers the method, so an artefact's folder needs no more than ``import qpass``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qpass.algorithms.rtn import rtn
from qpass.assignment import Assignment
from qpass.checkpoints import artefact
from qpass.checkpoints.artefact import METHOD, VERSION
from qpass.checkpoints.atomic import new_folder
from qpass.checkpoints.files import Checkpoint
from qpass.checkpoints.formats import Reader, reader_of
from qpass.checkpoints.stored import StoredLinear
from qpass.errors import CheckpointError, OptionError, UnsupportedError
from qpass.frontends.coded import in_memory, parameter_of, state_of
from qpass.frontends.registration import register_with_transformers
from qpass.frontends.stored_layers import read_layers
from qpass.lowering.given import given_of
from qpass.lowering.released import forget_pages, return_memory, without_values
from qpass.scheme import Scheme

TRIM_BYTES = 1 << 23
"""Weights read between two trims of the heap: it keeps a half of what quantizing needs in passing otherwise."""


class QPassConfig(QuantizationConfigMixin):
    """How a model is, or shall be, quantized.

    scheme       a scheme's name, or a table {module pattern: name}, as ``qpass.compile`` takes them
    exclude      module patterns that keep their weights
    calibration  of an algorithm that used data: its name and the data's fingerprint

    A config that was read has the layers of its artefact in ``modules``.
    """

    def __init__(
        self,
        scheme: Any = None,
        exclude: Any = (),
        *,
        calibration: dict[str, Any] | None = None,
        version: int = VERSION,
        modules: dict[str, Any] | None = None,
        checksum: str | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        """Raises SchemeError and OptionError for what can't be read."""
        if unknown:
            raise OptionError(f"unknown option {next(iter(unknown))!r} of QPassConfig; accepted: scheme, exclude")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.assignment = Assignment.make(scheme, exclude)
        self.scheme, self.exclude = scheme, [exclude] if isinstance(exclude, str) else list(exclude)
        self.version, self.calibration, self.modules, self.checksum = version, calibration, modules, checksum
        self.foreign: dict[str, Any] | None = None
        """Another program's quantization_config, whose codes are read instead of an artefact's."""
        self.layers: dict[str, StoredLinear] = {}
        """Codes by the names of their weights, for a state dict that somebody else made."""

    def to_dict(self) -> dict[str, Any]:
        scheme = self.scheme
        if isinstance(scheme, dict):
            scheme = {pattern: str(value) for pattern, value in scheme.items()}
        elif scheme is not None:
            scheme = None if callable(scheme) else str(scheme)
        own = {"quant_method": self.quant_method, "version": self.version, "scheme": scheme, "exclude": self.exclude}
        told = {"calibration": self.calibration, "modules": self.modules, "checksum": self.checksum}
        return own | {key: value for key, value in told.items() if value is not None}


class QPassQuantizer(HfQuantizer):
    """What transformers asks while it loads and saves."""

    requires_calibration = False
    quantization_config: QPassConfig

    def __init__(self, quantization_config: QPassConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = self.pre_quantized or bool(quantization_config.foreign or quantization_config.layers)
        self.chosen: dict[str, Scheme] = {}  # weights that are quantized as they are read
        self.layers = quantization_config.layers  # weights whose codes are in the files
        self.checkpoint: Checkpoint | None = None
        self.reader: Reader | None = None
        self.failure: CheckpointError | None = None
        self._quantize: _Quantize | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if not all(place is None or str(place) in ("cpu", "auto") for place in places):
            raise UnsupportedError(f"device_map={device_map!r}: qpass runs on the CPU")

    def update_device_map(self, device_map: Any) -> Any:
        return {"": "cpu"} if device_map == "auto" else device_map

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self.quantization_config.assignment.check(name for name, _ in linears(model))
            self.chosen = {
                f"{name}.weight": scheme
                for name, module in linears(model)
                if not is_tied(model, f"{name}.weight")
                and (scheme := self.quantization_config.assignment(name)).quantizes
            }
            return
        if self.layers:
            return
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise CheckpointError(f"{model.name_or_path}: quantized weights are read from safetensors files only")
        self.checkpoint = Checkpoint([Path(file) for file in checkpoint_files])
        where = self.checkpoint.files[0].parent / "config.json"
        self.reader = reader_of(self.quantization_config.foreign or self.quantization_config.to_dict(), where)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """All layers are read, and so checked, before transformers touches a tensor."""
        if self.checkpoint is not None and self.reader is not None:
            self.layers = read_layers(model, self.checkpoint, self.reader, weight_conversions)
        elif not self.layers:
            return weight_conversions
        names = self.reader.parts if self.reader is not None else (artefact.CODES,)
        parts = [rf"\.{part}$" for part in names]
        return [*weight_conversions, WeightConverter(parts, [".weight"], [_Stored(self)])]

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.chosen

    def get_quantize_ops(self) -> ConversionOps:
        self._quantize = self._quantize or _Quantize(self)
        return self._quantize

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.failure is not None:
            raise self.failure
        own = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [entry for entry in own if not _is_ours(entry)] or None  # type: ignore[assignment]
        self.checkpoint, self.reader, self.layers, self.chosen, self._quantize = None, None, {}, {}, None
        self.quantization_config.layers = {}
        attach(model, self)
        return_memory()
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes; the config gets its table of modules here, before it is written."""
        state, modules = state_of(model)
        config = self.quantization_config
        config.modules, config.checksum = modules, artefact.checksum(modules)
        config.foreign, config.layers = None, {}
        model.config.quantization_config = config
        return state, {METHOD: str(VERSION)}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """One tensor of a shard becomes codes as soon as it is read."""

    untrimmed = 0  # bytes read since the heap was trimmed last

    def __init__(self, quantizer: QPassQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        name = kwargs["full_layer_name"]
        value = _first(input_dict)
        scheme = self.quantizer.chosen[name]
        assert scheme.weight is not None
        try:
            weight = rtn(value, scheme.weight)
        except ValueError as error:  # what is raised here would end as a line of transformers' report
            self.quantizer.failure = CheckpointError(f"{kwargs['model'].name_or_path}: {name}: {error}")
            return {name: without_values(value.shape, value.dtype, name)}
        shape = (weight.n, weight.k)
        linear = StoredLinear(scheme.weight, shape, in_memory(weight), activation=scheme.activation, source="rtn")
        del weight
        forget_pages(value.data_ptr(), value.nbytes)
        self.untrimmed += value.nbytes
        if self.untrimmed > TRIM_BYTES:
            self.untrimmed = 0
            return_memory()
        return {name: parameter_of(name, linear, value.dtype)}


class _Stored(ConversionOps):
    """The tensors of one layer's codes become its weight; what they hold was read before."""

    def __init__(self, quantizer: QPassQuantizer) -> None:
        self.hf_quantizer = quantizer  # by this name transformers knows not to cast what is read

    def __deepcopy__(self, memo: Any) -> _Stored:
        return self  # transformers copies the converter for each layer; all of them read the same files

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        name = kwargs["full_layer_name"]
        dtype = kwargs["model"].get_parameter(name).dtype
        linear = self.hf_quantizer.layers.get(name)
        if linear is None:  # a layer that is not quantized, whose tensor has the name of one of the parts
            return {name: _first(input_dict).to(dtype)}
        return {name: parameter_of(name, linear, dtype)}


def _first(tensors: dict[str, Any]) -> Tensor:
    value = next(iter(tensors.values()))
    return value[0] if isinstance(value, list) else value


def _is_ours(entry: Any) -> bool:
    return any(isinstance(step, _Stored) for step in getattr(entry, "operations", ()))


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            yield name, module


def is_tied(model: nn.Module, parameter: str) -> bool:
    """Whether another module (an embedding) reads the same weight: it keeps its values."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return parameter in tied or parameter in tied.values()


def attach(model: Any, quantizer: QPassQuantizer) -> None:
    """Let ``model.save_pretrained`` write an artefact, all at once."""
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized, model.quantization_method = True, METHOD
    object.__setattr__(model, "save_pretrained", functools.partial(_save_pretrained, model))


def _save_pretrained(model: Any, save_directory: Any, **kwargs: Any) -> None:
    """transformers' own, into a folder that takes the place of the old one when it is whole."""
    plain = functools.partial(type(model).save_pretrained, model)
    if kwargs.get("push_to_hub") or getattr(model, "_hf_peft_config_loaded", False):
        plain(save_directory, **kwargs)
        return
    with new_folder(Path(save_directory), replaces=is_weights) as folder:
        plain(folder, **kwargs)


def is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf"))


def save(model: Any, folder: str | Path, *, scheme: Any = None, calibration: dict[str, Any] | None = None) -> None:
    """Write a transformers model whose weights have codes (of ``qpass.quantize``, of a checkpoint) as an artefact.

    Raises OptionError for a model without any, CheckpointError for a folder that can't be written.
    """
    if not any(given_of(parameter) is not None for parameter in model.parameters()):
        raise OptionError("no weight of this model has codes; qpass.quantize finds them")
    if not isinstance(getattr(model, "hf_quantizer", None), QPassQuantizer):
        attach(model, QPassQuantizer(QPassConfig(scheme, calibration=calibration)))
    model.save_pretrained(folder)


register_with_transformers()
