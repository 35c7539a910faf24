"""Rates: what this machine reaches at most, measured in a fraction of a second. The performance model and every share of a limit rest on them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

from qpass.cpu import Cpu, Rates, detect
from qpass.kernels.load import open_library
from qpass.kernels.source import rates_unit
from qpass.kernels.store import obtain

_CHAINS = 12  # as in cpp/rates.cpp
_REPEATS = 400_000  # about a millisecond
_READ_BYTES = 128 << 20  # a thread; four times the largest last-level cache in common use a core
_ROUNDS = 5


def measure(cpu: Cpu) -> Rates:
    """All threads at once, the best of five rounds. Raises KernelError where nothing can be compiled, ValueError without a tier."""
    library = open_library(obtain(rates_unit(cpu)))
    for name in ("qpass_rate_int8", "qpass_rate_bf16", "qpass_rate_vector"):
        function = getattr(library, name)
        function.argtypes, function.restype = (ctypes.c_int64,), ctypes.c_double
    library.qpass_rate_read.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    library.qpass_rate_read.restype = ctypes.c_double
    with ThreadPoolExecutor(cpu.cores) as pool:

        def rate(call: Callable[[int], float], work: float) -> float:
            """``work`` of each thread over the time of the slowest, in the best round: a limit is what was ever reached."""
            seconds = [max(pool.map(call, range(cpu.cores))) for _ in range(_ROUNDS)]
            return cpu.cores * work / min(seconds)

        instructions = _CHAINS * _REPEATS
        int8 = rate(lambda _: library.qpass_rate_int8(_REPEATS), 64.0 * instructions)
        bf16 = rate(lambda _: library.qpass_rate_bf16(_REPEATS), 32.0 * instructions)
        vector = rate(lambda _: library.qpass_rate_vector(_REPEATS), instructions)
        memory = [mmap.mmap(-1, _READ_BYTES + mmap.PAGESIZE) for _ in range(cpu.cores)]
        for part in memory:
            part.write(b"\1" * _READ_BYTES)
        places = [ctypes.addressof(ctypes.c_char.from_buffer(part)) for part in memory]
        read = rate(lambda i: library.qpass_rate_read(places[i], _READ_BYTES), _READ_BYTES)
        tiles = [0.0, 0.0]
        if cpu.tier == "amx":
            library.qpass_rate_tiles.argtypes = (ctypes.c_int64, ctypes.c_int32)
            library.qpass_rate_tiles.restype = ctypes.c_double
            products = _REPEATS // 20
            tiles = [
                rate(lambda _: library.qpass_rate_tiles(products, 0), 4.0 * 16 * 16 * 64 * products),
                rate(lambda _: library.qpass_rate_tiles(products, 1), 4.0 * 16 * 16 * 32 * products),
            ]
    return Rates(read, int8, bf16, vector, *tiles)


@cache
def measured_rates() -> Rates:
    """Of this machine at its own tier, measured once a process (half a second)."""
    return measure(detect())


def measured_cpu() -> Cpu:
    """This machine with its rates."""
    return replace(detect(), rates=measured_rates())
