"""``qpass doctor``: what this machine offers, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from qpass.errors import QpassError


@dataclass(frozen=True)
class Finding:
    """One row. ``advice`` says what to do, and is empty where all is well."""

    name: str
    value: str
    advice: str = ""
    level: Literal["ok", "warn", "fail"] = "ok"


def doctor() -> bool:
    """Print the findings to stdout; False when something needed is missing."""
    found = list(findings())
    console = Console(highlight=False)
    console.print(table(found))
    return all(finding.level != "fail" for finding in found)


def table(found: list[Finding]) -> Table:
    marks = {"ok": "[green]ok[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]"}
    shown = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    shown.add_column(no_wrap=True)
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for f in found:
        shown.add_row(marks[f.level], f.name, f.value + (f"\n[yellow]{f.advice}[/yellow]" if f.advice else ""))
    return shown


def findings() -> Iterator[Finding]:
    """All rows; one that raises becomes a failed row and the others still come."""
    for name, look in (
        ("system", _system),
        ("CPU", _cpu),
        ("ISA tier", _tier),
        ("AMX", _amx),
        ("caches", _caches),
        ("memory", _memory),
        ("read bandwidth", _bandwidth),
        ("compiler", _compiler),
        ("attention", _attention),
        ("torch", _torch),
        ("transformers", _transformers),
        ("cache folder", _cache_folder),
    ):
        yield _guarded(name, look)


def _guarded(name: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except QpassError as error:
        return Finding(name, "not usable", str(error), "fail")
    except Exception as error:  # a doctor who faints helps nobody
        return Finding(name, "unknown", f"{type(error).__name__}: {error}", "warn")


def _system() -> Finding:
    value = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    good = platform.system() == "Linux" and platform.machine() == "x86_64"
    advice = (
        ""
        if good
        else "the generated kernels are made for Linux on x86-64; other systems run on the fallback lowerings"
    )
    return Finding("system", value, advice, "ok" if good else "warn")


def _cpu() -> Finding:
    from qpass.cpu import detect

    cpu = detect()
    return Finding("CPU", f"{cpu.name}, {cpu.cores} cores for this process")


def _tier() -> Finding:
    from qpass.cpu import detect

    cpu = detect()
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    value = f"{cpu.tier} ({' '.join(flag for flag in known if flag in cpu.isa)})"
    if cpu.cap is not None:
        return Finding("ISA tier", value, f"capped by QPASS_ISA={cpu.cap}; unset it for full speed", "warn")
    if cpu.tier == "none":
        return Finding("ISA tier", value, "no AVX2: every linear runs on the reference lowering, slowly", "warn")
    if cpu.tier == "avx2":
        return Finding("ISA tier", value, "no AVX-512 VNNI: int4 and int8 kernels run at AVX2 speed", "warn")
    return Finding("ISA tier", value)


def _amx() -> Finding:
    from qpass.cpu import detect

    cpu = detect()
    if "amx_tile" not in cpu.isa:
        return Finding("AMX", "this CPU has none")
    if not cpu.amx_permitted:
        advice = "the kernel or a container's seccomp profile refuses ARCH_REQ_XCOMP_PERM: Linux 5.16 or later, and permit arch_prctl"
        return Finding("AMX", "present, not permitted", advice, "warn")
    return Finding("AMX", "present, permitted")


def _caches() -> Finding:
    from qpass.cpu import detect

    cpu = detect()
    return Finding(
        "caches", f"L1d {cpu.l1d_bytes >> 10} KiB, L2 {cpu.l2_bytes >> 10} KiB, L3 {cpu.l3_bytes / 2**20:.0f} MiB"
    )


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return Finding("memory", f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB free")


def _bandwidth() -> Finding:
    from qpass.measure.bandwidth import measure_bandwidth_gbps

    gbps = measure_bandwidth_gbps()
    value = f"{gbps:.1f} GB/s: a model of 1 GB of weights can't give more than {gbps:.0f} tokens a second"
    advice = (
        "that is little: other programs may be using the memory, or this is a small slice of a shared machine"
        if gbps < 5
        else ""
    )
    return Finding("read bandwidth", value, advice, "warn" if advice else "ok")


def _compiler() -> Finding:
    from qpass.kernels.build import compiler_version, find_compiler

    found = find_compiler()
    return Finding("compiler", compiler_version(found))


def _attention() -> Finding:
    from qpass.cpu import detect
    from qpass.errors import KernelError
    from qpass.kernels import attention_unit

    cpu = detect()
    try:
        attention_unit.ensure(cpu)
    except KernelError as error:
        return Finding("attention", "plain torch, slow", str(error), "warn")
    return Finding("attention", f"native {cpu.tier}")


def _torch() -> Finding:
    version = importlib.metadata.version("torch")
    import torch

    value = f"{version}, {torch.get_num_threads()} threads"
    if _release(version) < (2, 13):
        return Finding("torch", value, "qpass is tested with torch 2.13: pip install -U torch", "warn")
    return Finding("torch", value)


def _transformers() -> Finding:
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return Finding("transformers", "not installed", "run and demo need it: pip install transformers", "warn")
    if _release(version) < (5,):
        return Finding(
            "transformers", version, "the static cache needs transformers 5: pip install -U transformers", "warn"
        )
    return Finding("transformers", version)


def _cache_folder() -> Finding:
    from qpass.kernels.store import cache_folder, open_folder

    folder = open_folder(cache_folder())
    mode = stat.S_IMODE(folder.stat().st_mode)
    count, size = 0, 0
    for root, _, names in os.walk(folder):
        for name in names:
            count += 1
            size += os.stat(os.path.join(root, name), follow_symlinks=False).st_size
    value = f"{folder}, mode {mode:04o}, {size / 1e6:.0f} MB in {count} files"
    if not os.access(folder, os.W_OK):
        return Finding("cache folder", value, "not writable: set QPASS_CACHE to a folder of your own", "fail")
    if sys.platform != "win32" and mode & 0o077:
        return Finding("cache folder", value, f"others may read it: chmod 700 {folder}", "warn")
    return Finding("cache folder", value)


def _release(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
