"""The attention kernel: one unit for this CPU, built and loaded like those of the linears."""

from __future__ import annotations

import ctypes
import threading

from qpass.cpu import Cpu, Tier, detect
from qpass.errors import KernelError
from qpass.kernels.load import load_binding, open_library
from qpass.kernels.source import COMMON_FLAGS, Unit, included, tier_flags
from qpass.kernels.store import obtain

_lock = threading.Lock()
_serving: Unit | None = None


def attention_unit(cpu: Cpu, tier: Tier | None = None, *, pairs: bool = True, emulate: bool = False) -> Unit:
    """The kernel for one tier (the machine's own by default). Raises KernelError where there is none.

    ``pairs`` False leaves the bf16 dot product out, as on a CPU without one; ``emulate`` has plain C++ in place of the
    tile instructions: both for tests.
    """
    tier = tier or cpu.tier
    try:
        flags = tier_flags(cpu, tier)
    except ValueError as error:
        raise KernelError(f"the attention kernel needs AVX2; this CPU is {cpu.name} with tier {tier}") from error
    if not pairs:
        flags = [flag for flag in flags if flag != "-mavx512bf16"]
    if emulate:
        flags.append(f"-DQPASS_{tier.upper()}_EMULATED")
    text = '#include "attention.h"\nQPASS_DEFINE_ATTENTION()\n'
    return Unit(f"attention-{tier}", text, (*COMMON_FLAGS, *flags), included("attention.h"))


def ensure(cpu: Cpu | None = None, tier: Tier | None = None, *, pairs: bool = True, emulate: bool = False) -> None:
    """Make ``torch.ops.qpass.attention`` run natively. Raises KernelError; the op then keeps its plain-torch meaning."""
    global _serving
    with _lock:
        unit = attention_unit(cpu or detect(), tier, pairs=pairs, emulate=emulate)
        if unit == _serving:
            return
        library = open_library(obtain(unit))
        library.qpass_attention_kernel.restype = ctypes.c_void_p
        if load_binding().qpass_register_attention(library.qpass_attention_kernel()):
            raise KernelError(f"{unit.name} was built for another version of its interface")
        _serving = unit
