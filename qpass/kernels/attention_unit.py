"""The attention kernel: one unit for this CPU and its torch binding, built and loaded like the linears' own."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

from qpass.cpu import Cpu, Tier, detect
from qpass.errors import KernelError
from qpass.kernels.load import open_library
from qpass.kernels.source import COMMON_FLAGS, Unit, binding_unit, included, tier_flags
from qpass.kernels.store import obtain

_lock = threading.Lock()
_binding: ctypes.CDLL | None = None
_serving: Unit | None = None


def attention_unit(cpu: Cpu, tier: Tier | None = None, *, pairs: bool = True) -> Unit:
    """The kernel for one tier (the machine's own by default). Raises KernelError where there is none.

    ``pairs`` False leaves the bf16 dot product out, as on a CPU without one: for tests.
    """
    tier = tier or cpu.tier
    try:
        flags = tier_flags(cpu, tier)
    except ValueError as error:
        raise KernelError(f"the attention kernel needs AVX2; this CPU is {cpu.name} with tier {tier}") from error
    if not pairs:
        flags = [flag for flag in flags if flag != "-mavx512bf16"]
    text = '#include "attention.h"\nQPASS_DEFINE_ATTENTION()\n'
    return Unit(f"attention-{tier}", text, (*COMMON_FLAGS, *flags), included("attention.h"))


def ensure(cpu: Cpu | None = None, tier: Tier | None = None, *, pairs: bool = True) -> None:
    """Make ``torch.ops.qpass.attention`` run natively. Raises KernelError; the op then keeps its plain-torch meaning."""
    global _serving
    with _lock:
        unit = attention_unit(cpu or detect(), tier, pairs=pairs)
        if unit == _serving:
            return
        library = open_library(obtain(unit))
        library.qpass_attention_kernel.restype = ctypes.c_void_p
        if _load_binding().qpass_register_attention(library.qpass_attention_kernel()):
            raise KernelError(f"{unit.name} was built for another version of its interface")
        _serving = unit


def _load_binding() -> ctypes.CDLL:
    global _binding
    if _binding is None:
        import torch

        root = Path(torch.__file__).parent
        unit = binding_unit((str(root / "include"),), (str(root / "lib"),), "binding_attention")
        binding = open_library(obtain(unit))
        binding.qpass_register_attention.argtypes = (ctypes.c_void_p,)
        binding.qpass_register_attention.restype = ctypes.c_int
        _binding = binding
    return _binding
