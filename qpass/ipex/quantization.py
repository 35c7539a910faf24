"""``ipex.quantization``."""

from qpass.frontends.ipex import (
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    WoqWeightQScheme,
    autotune,
    convert,
    default_dynamic_qconfig_mapping,
    default_static_qconfig_mapping,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)

__all__ = [
    "WoqActQuantMode",
    "WoqLowpMode",
    "WoqWeightDtype",
    "WoqWeightQScheme",
    "autotune",
    "convert",
    "default_dynamic_qconfig_mapping",
    "default_static_qconfig_mapping",
    "get_smooth_quant_qconfig_mapping",
    "get_weight_only_quant_qconfig_mapping",
    "prepare",
]
