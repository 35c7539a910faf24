"""The names that users of Intel Extension for PyTorch (IPEX 2.8) wrote, mapped to qpass; see docs/from_ipex.md.

What has no equal raises UnsupportedError with the way to say it here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qpass.errors import OptionError, UnsupportedError
from qpass.frontends.api import compile
from qpass.scheme import GROUPS, Scheme


class WoqWeightDtype(IntEnum):
    INT8 = 1
    INT4 = 2
    NF4 = 3


class WoqLowpMode(IntEnum):
    """The narrowest type that may be computed in. NONE, FP16 and BF16 all mean 16-bit activations here, whose products
    with codes are exact; INT8 quantizes activations."""

    NONE = 0
    FP16 = 1
    BF16 = 2
    INT8 = 3


class WoqActQuantMode(IntEnum):
    """What shares one scale of the activations, where ``lowp_mode`` is INT8. BATCH is a token, IC_BLOCK a group of inputs."""

    NONE = -1
    PER_TENSOR = 0
    PER_IC_BLOCK = 1
    PER_BATCH = 2
    PER_BATCH_IC_BLOCK = 3
    PER_TENSOR_SYM = 4
    PER_IC_BLOCK_SYM = 5
    PER_BATCH_SYM = 6
    PER_BATCH_IC_BLOCK_SYM = 7


class WoqWeightQScheme(IntEnum):
    UNDEFINED = 0
    ASYMMETRIC = 1
    SYMMETRIC = 2


@dataclass(frozen=True)
class QConfig:
    """What a qconfig mapping says: a scheme of qpass. ``alpha`` is SmoothQuant's, which needs calibration."""

    scheme: str
    alpha: float | str | None = None

    @property
    def calibrates(self) -> bool:
        return Scheme.parse(self.scheme).activation == "a8-static"


def get_weight_only_quant_qconfig_mapping(
    *,
    weight_dtype: Any = WoqWeightDtype.INT8,
    lowp_mode: int = WoqLowpMode.NONE,
    act_quant_mode: int = WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM,
    group_size: int = -1,
    weight_qscheme: int = WoqWeightQScheme.UNDEFINED,
) -> QConfig:
    """The scheme that these say, such as w4a8-g128. Raises OptionError, UnsupportedError."""
    bits = _bits(weight_dtype)
    int8 = _enum(WoqLowpMode, lowp_mode, "lowp_mode") == WoqLowpMode.INT8
    group = _group(group_size)
    if int8:
        _check_activations(_enum(WoqActQuantMode, act_quant_mode, "act_quant_mode"), group, bits)
    how = _enum(WoqWeightQScheme, weight_qscheme, "weight_qscheme")
    name = f"w{bits}a{8 if int8 else 16}" + (f"-g{group}" if group else "")
    symmetric = Scheme.parse(name).weight.symmetric  # type: ignore[union-attr]
    if how != WoqWeightQScheme.UNDEFINED and symmetric != (how == WoqWeightQScheme.SYMMETRIC):
        name += "-asym" if symmetric else "-sym"
    return QConfig(name + ("-dynamic" if int8 and not group else ""))


def get_smooth_quant_qconfig_mapping(
    alpha: float | str = 0.5,
    act_observer: Any = None,
    act_ic_observer: Any = None,
    wei_observer: Any = None,
    wei_ic_observer: Any = None,
    share_weight_observers: bool = True,
) -> QConfig:
    """SmoothQuant (arXiv 2211.10438) with ``alpha``: int8 weights and static int8 activations, w8a8-static."""
    observers = {"act": act_observer, "act_ic": act_ic_observer, "wei": wei_observer, "wei_ic": wei_ic_observer}
    for name, observer in observers.items():
        if observer is not None:
            raise UnsupportedError(f"{name}_observer has no equal: qpass.calibrate observes with its own; leave it out")
    if not share_weight_observers:
        raise UnsupportedError(
            "share_weight_observers=False has no equal: linears of one input share one smoothing, which costs nothing then"
        )
    if not isinstance(alpha, str) and not 0 <= alpha <= 1:
        raise OptionError(f"alpha is {alpha}; accepted: 0 to 1")
    return QConfig("w8a8-static", alpha)


default_dynamic_qconfig_mapping = QConfig("w8a8-dynamic")
default_static_qconfig_mapping = QConfig("w8a8-static")


def optimize(
    model: nn.Module,
    optimizer: Any = None,
    dtype: torch.dtype | None = None,
    inplace: bool = False,
    device: str = "cpu",
    quantization_config: QConfig | None = None,
    qconfig_summary_file: str | Path | None = None,
    low_precision_checkpoint: Any = None,
    sample_inputs: Any = None,
    deployment_mode: bool = True,
    cache_weight_for_large_batch: bool = False,
) -> Any:
    """``ipex.llm.optimize``: the model compiled by ``qpass.compile`` with the scheme that the config says.

    dtype     converts the model first; None leaves it (IPEX' default made it fp32)
    inplace   frees the full-precision weights as they are packed; the model itself can't be called any more then
    A SmoothQuant config without a ``qconfig_summary_file`` gives the model back, to be calibrated. ``sample_inputs``,
    ``deployment_mode`` and ``cache_weight_for_large_batch`` have nothing to do here: no trace, one layout for every batch.
    """
    if optimizer is not None:
        raise UnsupportedError("an optimizer means training; qpass serves inference only")
    if str(device) != "cpu":
        raise UnsupportedError(f"device is {device!r}; qpass runs on the CPU")
    if low_precision_checkpoint is not None:
        raise UnsupportedError(
            "low_precision_checkpoint has no equal: a GPTQ or AWQ checkpoint is a model of its own here, whose codes run as "
            "they are: ipex.llm.optimize(qpass.load(its folder))"
        )
    if quantization_config is not None and not isinstance(quantization_config, QConfig):
        raise OptionError(
            f"quantization_config is a {type(quantization_config).__name__}; accepted: what "
            "qpass.ipex.quantization.get_weight_only_quant_qconfig_mapping or get_smooth_quant_qconfig_mapping returns"
        )
    if dtype is not None and any(p.dtype != dtype for p in model.parameters() if p.is_floating_point()):
        model = model.to(dtype) if inplace else _copied(model, dtype)
    config = quantization_config or QConfig("w16a16")
    extra: dict[str, Any] = {}
    if config.calibrates:
        if qconfig_summary_file is None:
            return model
        extra = {"stats": str(qconfig_summary_file), "alpha": config.alpha}
    return compile(model.eval(), scheme=config.scheme, release_weights=inplace, **extra)


def prepare(
    model: nn.Module,
    configure: QConfig,
    example_inputs: Any = None,
    inplace: bool = False,
    bn_folding: bool = True,
    example_kwarg_inputs: Any = None,
) -> Prepared:
    """The model, ready to be calibrated: call it on samples, then ``save_qconf_summary`` or ``convert``."""
    if not isinstance(configure, QConfig):
        raise OptionError(f"prepare takes a qconfig mapping of qpass.ipex, not a {type(configure).__name__}")
    return Prepared(model.eval(), configure)


def convert(model: Prepared, inplace: bool = False) -> Any:
    """A prepared model, compiled with its scheme and with what its calibration saw."""
    if not isinstance(model, Prepared):
        raise OptionError(f"convert takes what prepare returned, not a {type(model).__name__}")
    extra: dict[str, Any] = {}
    if model.config.calibrates:
        extra = {"stats": model.statistics(), "alpha": model.config.alpha}
    return compile(model.model, scheme=model.config.scheme, release_weights=inplace, **extra)


class Prepared:
    """A model that remembers what it is called on."""

    def __init__(self, model: nn.Module, config: QConfig) -> None:
        self.model, self.config = model, config
        self.batches: list[Any] = []
        self._statistics: Any = None  # of the batches so far, or loaded

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output; the batch is kept for :meth:`statistics`."""
        only = args[0] if len(args) == 1 else None
        if isinstance(only, tuple) and len(only) == 2 and isinstance(only[0], int):
            only = only[1]  # IPEX' tutorial hands on what enumerate() gives
            args = (only,)
        if isinstance(only, Mapping):
            args, kwargs = (), {**only, **kwargs}
        if self.config.calibrates:
            self.batches.append(kwargs if kwargs and not args else args)
            self._statistics = None
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def eval(self) -> Prepared:
        return self

    def statistics(self) -> Any:
        """What the linears read over the samples. Raises OptionError where there were none."""
        from qpass.frontends.calibrate import calibrate

        if not self.config.calibrates:
            raise UnsupportedError(f"{self.config.scheme} needs no calibration: there is nothing to save")
        if self._statistics is None:
            self._statistics = calibrate(self.model, self.batches)
        return self._statistics

    def save_qconf_summary(self, qconf_summary: str | Path) -> None:
        """Write a file of statistics (safetensors, whatever its name's end), for ``qconfig_summary_file``."""
        self.statistics().save(qconf_summary)

    def load_qconf_summary(self, qconf_summary: str | Path) -> None:
        from qpass.frontends.statistics import Statistics

        self._statistics = Statistics.load(qconf_summary)


def autotune(*args: Any, **kwargs: Any) -> Any:
    raise UnsupportedError("autotune has no equal by this name: qpass.calibrate finds alpha a layer with alpha='auto'")


def _bits(weight_dtype: Any) -> int:
    if weight_dtype in (torch.qint8, torch.quint4x2):
        warnings.warn(f"{weight_dtype} as a weight dtype is deprecated: use WoqWeightDtype.INT8 or INT4", stacklevel=3)
        return 8 if weight_dtype == torch.qint8 else 4
    if _enum(WoqWeightDtype, weight_dtype, "weight_dtype") == WoqWeightDtype.NF4:
        raise UnsupportedError(
            "NF4 has no equal: its 16 levels are a table, which integer kernels can't multiply; use WoqWeightDtype.INT4 "
            "with group_size=64, scheme 'w4a16-g64'"
        )
    return 8 if weight_dtype == WoqWeightDtype.INT8 else 4


def _group(size: int) -> int | None:
    if size == -1:
        return None
    if size not in GROUPS:
        raise UnsupportedError(
            f"group_size {size} has no equal; accepted: -1 and {', '.join(map(str, GROUPS))}: a smaller group is at least "
            "as accurate, and costs 3 bytes a group"
        )
    return size


def _check_activations(mode: WoqActQuantMode, group: int | None, bits: int) -> None:
    kind = mode.name.removesuffix("_SYM")
    if kind in ("PER_TENSOR", "PER_IC_BLOCK"):
        raise UnsupportedError(
            f"act_quant_mode {mode.name} has no equal: one scale for all tokens makes a token's result depend on the others; "
            "use PER_BATCH_SYM, or PER_BATCH_IC_BLOCK_SYM with a group_size"
        )
    if kind == "PER_BATCH" and group:
        raise UnsupportedError(
            f"act_quant_mode {mode.name} with group_size {group} has no equal: grouped weights meet activations with a "
            f"scale a token and group; use PER_BATCH_IC_BLOCK_SYM, scheme 'w{bits}a8-g{group}'"
        )
    if kind == "NONE":
        raise OptionError("lowp_mode INT8 needs an act_quant_mode; accepted: PER_BATCH_SYM, PER_BATCH_IC_BLOCK_SYM")


def _enum(kind: Any, value: Any, name: str) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        accepted = ", ".join(f"{kind.__name__}.{each.name}" for each in kind)
        raise OptionError(f"{name} is {value!r}; accepted: {accepted}") from error


def _copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    import copy

    return copy.deepcopy(model).to(dtype)
