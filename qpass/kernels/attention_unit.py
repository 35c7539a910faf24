"""The attention kernel: one unit for this CPU and its torch binding, built and loaded like the linears' own."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

from qpass.cpu import Cpu, Tier, detect
from qpass.errors import KernelError
from qpass.kernels.source import COMMON_FLAGS, HEADERS, Unit, binding_unit
from qpass.kernels.store import obtain

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mbmi2")
_TIER_FLAGS: dict[Tier, tuple[str, ...]] = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512_vnni": _AVX512,
    "amx": (*_AVX512, "-mavx512bf16"),
}
_NEEDED = ("abi.h", "attention*.h", "simd*.h")

_lock = threading.Lock()
_binding: ctypes.CDLL | None = None
_units: dict[Unit, ctypes.CDLL] = {}  # opened once, never closed: their code may be running
_serving: Unit | None = None


def attention_unit(cpu: Cpu, tier: Tier | None = None, *, pairs: bool = True) -> Unit:
    """The kernel for one tier (the machine's own by default). Raises KernelError where there is none.

    ``pairs`` False leaves the bf16 dot product out, as on a CPU without one: for tests.
    """
    tier = tier or cpu.tier
    if tier not in _TIER_FLAGS:
        raise KernelError(f"the attention kernel needs AVX2; this CPU is {cpu.name} with tier {tier}")
    flags = [flag for flag in _TIER_FLAGS[tier] if pairs or flag != "-mavx512bf16"]
    if tier == "avx512_vnni" and pairs and "avx512_bf16" in cpu.isa:
        flags.append("-mavx512bf16")
    headers = tuple(sorted(path for pattern in _NEEDED for path in HEADERS.glob(pattern)))
    text = '#include "attention.h"\nQPASS_DEFINE_ATTENTION()\n'
    return Unit(f"attention-{tier}", text, (*COMMON_FLAGS, *flags), headers)


def attention_binding_unit(include: tuple[str, ...], library: tuple[str, ...]) -> Unit:
    """The unit that registers ``qpass::attention`` with torch, whose folders the caller knows."""
    linears = binding_unit(include, library)
    headers = tuple(HEADERS / name for name in ("abi.h", "attention_abi.h", "scratch.h"))
    text = (HEADERS / "binding_attention.cpp").read_text()
    return Unit("binding-attention", text, linears.flags, headers, linears.libraries)


def ensure(cpu: Cpu | None = None, tier: Tier | None = None, *, pairs: bool = True) -> None:
    """Make ``torch.ops.qpass.attention`` run natively. Raises KernelError; the op then keeps its plain-torch meaning."""
    global _serving
    with _lock:
        unit = attention_unit(cpu or detect(), tier, pairs=pairs)
        if unit == _serving:
            return
        if unit not in _units:
            _units[unit] = ctypes.CDLL(str(obtain(unit)), mode=ctypes.RTLD_LOCAL)
        library = _units[unit]
        library.qpass_attention_kernel.restype = ctypes.c_void_p
        if _load_binding().qpass_register_attention(library.qpass_attention_kernel()):
            raise KernelError(f"{unit.name} was built for another version of its interface")
        _serving = unit


def _load_binding() -> ctypes.CDLL:
    global _binding
    if _binding is None:
        import torch

        root = Path(torch.__file__).parent
        unit = attention_binding_unit((str(root / "include"),), (str(root / "lib"),))
        binding = ctypes.CDLL(str(obtain(unit)), mode=ctypes.RTLD_LOCAL)
        binding.qpass_register_attention.argtypes = (ctypes.c_void_p,)
        binding.qpass_register_attention.restype = ctypes.c_int
        _binding = binding
    return _binding
