"""Make ``quant_method: "qpass"`` known to transformers, without importing it: ``import qpass`` stays fast."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

QUANTIZERS = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register now if transformers' table of methods is loaded, else as soon as somebody loads it."""
    if QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Awaits) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaits())


def _register() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    ours = sys.modules.get("qpass.frontends.huggingface")
    if ours is not None and not hasattr(ours, "QPassQuantizer"):
        return  # it is being imported, imported transformers, and registers itself at its end
    from qpass.frontends.huggingface import QPassConfig, QPassQuantizer

    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("qpass", QPassConfig)
    AUTO_QUANTIZER_MAPPING.setdefault("qpass", QPassQuantizer)


class _Awaits(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets the one module be found as ever and registers behind its execution."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.plain.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.plain.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)  # what else is asked of a loader: a module's source, its resources
