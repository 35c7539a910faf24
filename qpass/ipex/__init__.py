"""Moving from Intel Extension for PyTorch: ``import qpass.ipex as ipex``. See docs/from_ipex.md."""

from qpass.frontends.ipex import optimize
from qpass.ipex import llm, quantization

__all__ = ["llm", "optimize", "quantization"]
