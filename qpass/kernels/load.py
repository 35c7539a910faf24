"""Load: kernels into this process. Builds what the cache lacks, opens it, and hands its table to the torch binding."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from qpass.cpu import Cpu, Tier, detect
from qpass.errors import KernelError
from qpass.kernels.format import KernelFormat
from qpass.kernels.plan import Tuning, a16_by_int8
from qpass.kernels.source import binding_unit, extras, kernel_unit
from qpass.kernels.store import obtain
from qpass.kernels.tuning import tuned

_lock = threading.RLock()
_binding: ctypes.CDLL | None = None
_libraries: dict[Path, ctypes.CDLL] = {}  # opened once, never closed: their code may be running
_registered: dict[int, _Registered] = {}  # by format number


class _Registered(NamedTuple):
    target: tuple[Tier, bool, tuple[str, ...], bool]  # tier, emulated, extra instructions, a16 by int8
    path: Path
    tuning: Tuning


def ensure(*formats: KernelFormat, cpu: Cpu | None = None, tier: Tier | None = None, emulate: bool = False) -> None:
    """Make ``torch.ops.qpass.packed_linear`` serve these formats on this machine. Raises KernelError.

    ``tier`` and ``emulate`` are for tests: without them each format gets the machine's best kernel, once.
    """
    cpu = cpu or detect()
    tier = tier or cpu.tier
    targets = {f: (tier, emulate, extras(cpu, tier), a16_by_int8(f, cpu, tier)) for f in formats}
    with _lock:
        known = {number: kernel.target for number, kernel in _registered.items()}
        missing = [f for f, target in targets.items() if known.get(f.number) != target]
        if not missing and _binding is not None:
            return
        load_binding()
        for format, path in zip(missing, _obtain(missing, cpu, tier, emulate), strict=True):
            _register(format, _Registered(targets[format], path, tuned(format, cpu, tier)))


def tuning_of(format: KernelFormat) -> Tuning:
    """How calls of a format that :func:`ensure` loaded are walked now."""
    return _registered[format.number].tuning


def retune(format: KernelFormat, tuning: Tuning, cpu: Cpu | None = None) -> None:
    """Walk calls of ``format`` by ``tuning`` from now on: for the search, and for tests that want one path."""
    with _lock:
        if format.number not in _registered:
            ensure(format, cpu=cpu)
        _register(format, _registered[format.number]._replace(tuning=tuning))


def _obtain(formats: Iterable[KernelFormat], cpu: Cpu, tier: Tier, emulate: bool) -> list[Path]:
    units = [kernel_unit(format, cpu, tier, emulate=emulate) for format in formats]
    if len(units) < 2:
        return [obtain(unit) for unit in units]
    with ThreadPoolExecutor(max_workers=max(1, cpu.cores)) as pool:
        return list(pool.map(obtain, units))


def load_binding() -> ctypes.CDLL:
    """The library that registers the native ops with torch, opened once a process."""
    global _binding
    with _lock:
        if _binding is not None:
            return _binding
        import torch

        root = Path(torch.__file__).parent
        path = obtain(binding_unit((str(root / "include"),), (str(root / "lib"),)))
        binding = open_library(path)
        binding.qpass_register.argtypes = (ctypes.c_void_p, *[ctypes.c_int32] * 3)
        binding.qpass_register.restype = ctypes.c_int
        binding.qpass_register_attention.argtypes = (ctypes.c_void_p,)
        binding.qpass_register_attention.restype = ctypes.c_int
        _binding = binding
    return _binding


def _register(format: KernelFormat, kernel: _Registered) -> None:
    library = open_library(kernel.path)
    library.qpass_kernel.restype = ctypes.c_void_p
    problem = load_binding().qpass_register(library.qpass_kernel(), *kernel.tuning)
    if problem:
        kind = "version" if problem == 2 else "format"
        raise KernelError(f"{kernel.path}: its table has a wrong {kind} for {format}")
    _registered[format.number] = kernel


def open_library(path: Path) -> ctypes.CDLL:
    """A checked unit, opened once a process."""
    library = _libraries.get(path)
    if library is None:
        try:
            library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
        except OSError as error:
            raise KernelError(f"{path} can't be loaded: {error}") from error
        _libraries[path] = library
    return library
