"""qpass: quantized transformer inference on CPUs, inside PyTorch.

torch.compile(model, backend="qpass")       any model; int8 weights by default
qpass.compile(model, scheme="w4a16-g128")   the same with names
qpass.quantize(model, algorithm="gptq")     better codes first, found with a calibration
qpass.calibrate(model), qpass.search(model) statistics for static int8 and smoothing; a scheme for each layer, within a budget
qpass.speculate(model, draft)               the same text in fewer steps: a draft proposes, one forward checks
qpass.explain(model)                        what became of each linear
qpass.load(path)                            a model in any format: full precision, GPTQ, AWQ, GGUF, our own artefact
qpass.save(model, folder)                   quantized weights as an artefact, which from_pretrained reads
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qpass.frontends.registration import register_with_transformers

if TYPE_CHECKING:
    from qpass.frontends.api import compile
    from qpass.frontends.calibrate import calibrate
    from qpass.frontends.explain import explain
    from qpass.frontends.huggingface import QPassConfig, save
    from qpass.frontends.load import load
    from qpass.frontends.quantize import quantize
    from qpass.frontends.recipe import Recipe
    from qpass.frontends.search import search
    from qpass.frontends.speculation import speculate
    from qpass.frontends.statistics import Statistics
    from qpass.scheme import SCHEMES, Format, Scheme

__version__ = "0.1.0"

_PLACES = {
    "compile": "qpass.frontends.api",
    "calibrate": "qpass.frontends.calibrate",
    "search": "qpass.frontends.search",
    "Recipe": "qpass.frontends.recipe",
    "Statistics": "qpass.frontends.statistics",
    "explain": "qpass.frontends.explain",
    "quantize": "qpass.frontends.quantize",
    "load": "qpass.frontends.load",
    "save": "qpass.frontends.huggingface",
    "QPassConfig": "qpass.frontends.huggingface",
    "speculate": "qpass.frontends.speculation",
    "Scheme": "qpass.scheme",
    "Format": "qpass.scheme",
    "SCHEMES": "qpass.scheme",
}

__all__ = [
    "SCHEMES",
    "Format",
    "QPassConfig",
    "Recipe",
    "Scheme",
    "Statistics",
    "calibrate",
    "compile",
    "explain",
    "load",
    "quantize",
    "save",
    "search",
    "speculate",
]


def __getattr__(name: str) -> Any:
    """Import on first use: ``qpass --help`` and ``import torch`` (whose logging may import qpass) stay fast."""
    if name not in _PLACES:
        raise AttributeError(f"module 'qpass' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)


register_with_transformers()


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
