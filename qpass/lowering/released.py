"""Weights without full-precision data: compiled graphs never read them, a linear layer outside of any graph runs on their
codes where they were given some, and whoever else reads them gets a clear error."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import ReleasedWeightError
from qpass.lowering.given import give, given_of

_HARMLESS = frozenset(
    [
        "shape",
        "dtype",
        "device",
        "layout",
        "requires_grad",
        "grad",
        "grad_fn",
        "is_leaf",
        "ndim",
        "nbytes",
        "itemsize",
        "is_sparse",
        "is_quantized",
        "is_meta",
        "is_nested",
        "is_mkldnn",
        "is_cpu",
        "is_cuda",
        "is_mps",
        "is_xpu",
        "is_complex",
        "size",
        "dim",
        "numel",
        "nelement",
        "stride",
        "element_size",
        "storage_offset",
        "is_contiguous",
        "is_floating_point",
        "_version",
        "names",
        "output_nr",
        "_backward_hooks",
        "__hash__",
        "requires_grad_",
        "requires_grad =",
        "grad =",
        "_is_view",
        "is_inference",
        "is_shared",
        "_has_compatible_shallow_copy_type",
    ]
)
"""What may be asked of a released weight: everything that doesn't look at its values."""


Eager = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""What runs ``F.linear(x, weight, bias)`` over a weight's codes, outside of any graph."""


class ReleasedParameter(nn.Parameter):
    """A Parameter with a shape and no values. A read raises :class:`ReleasedWeightError`, which names it.

    With given codes and ``qpass_eager`` it serves ``F.linear``, a copy of itself, and a move to another dtype, which is
    that of the layer's results.
    """

    qpass_name: str
    qpass_eager: Eager | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling() and not _only_shapes():
            name = getattr(func, "__name__", "")
            if name in ("__get__", "__set__"):
                attribute = getattr(func.__self__, "__name__", "")
                name = f"{attribute} =" if name == "__set__" else attribute
            if name not in _HARMLESS:
                released = next((a for a in _flat(args, kwargs) if isinstance(a, ReleasedParameter)), None)
                if released is not None:
                    return released._served(name, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def _served(self, name: str, args: tuple, kwargs: dict) -> Any:
        """The few operations that need no values. Raises ReleasedWeightError for all others."""
        given = given_of(self)
        if name == "linear" and self.qpass_eager is not None:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if weight is self:
                return self.qpass_eager(x, weight, bias)
        if name == "to" and given is not None:
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **{k: v for k, v in kwargs.items() if k != "copy"})
            if device is None or device.type == "cpu":
                return self._as(dtype or self.dtype)
        if name in ("detach", "cpu", "contiguous") and given is not None:
            return self  # a state dict may name it; who writes one out is refused there
        if name in _DTYPES and given is not None:
            return self._as(_DTYPES[name])
        if name == "data =" and isinstance(args[1], ReleasedParameter) and args[1].shape == self.shape:
            with torch._C.DisableTorchFunctionSubclass():
                self.data = args[1]
            return None
        raise ReleasedWeightError(
            f"{self.qpass_name}: its full-precision data is not there (it was released after packing, or loaded as codes), and "
            f"{name or 'this'} reads it; linear layers and compiled models don't. Load the model unquantized, or compile with "
            "release_weights=False"
        )

    def _as(self, dtype: torch.dtype) -> ReleasedParameter:
        return self if dtype == self.dtype else without_values(self.shape, dtype, self.qpass_name)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"ReleasedParameter({self.qpass_name}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict) -> Any:
        given = given_of(self)
        if given is None:
            return self._served("__deepcopy__", (), {})
        twin = without_values(self.shape, self.dtype, self.qpass_name)
        twin.qpass_eager = self.qpass_eager
        give(twin, given)
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._served("__reduce_ex__", (), {})


_DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


def _only_shapes() -> bool:
    """Whether tensors are faked now: nothing reads a value then."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def without_values(shape: Sequence[int], dtype: torch.dtype, name: str) -> ReleasedParameter:
    """A new Parameter that has a shape and no values; it takes address space and no memory."""
    parameter = ReleasedParameter(_hollow(shape, dtype), requires_grad=False)
    parameter.qpass_name = name
    return parameter


def _hollow(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in address space alone. Who gets past the class (another compiler's graph) reads NaN, not a plausible 0."""
    count = torch.Size(shape).numel()
    size = max(1, count * dtype.itemsize)
    region = mmap.mmap(-1, size)
    tensor = torch.frombuffer(region, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
    if count:
        _show_nan(tensor.data_ptr(), size)
    return tensor.view(shape)


def _show_nan(address: int, size: int) -> None:
    """Map one shared run of pages full of ones, which is NaN in every float type, all over a mapping; Linux only."""
    handle = _ones()
    if handle is None:
        return
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    for begin in range(0, size, _RUN):
        length = min(_RUN, size - begin)
        libc.mmap(address + begin, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED, handle, 0)


_RUN = 1 << 22
_MAP_FIXED = 0x10


@functools.cache
def _ones() -> int | None:
    """A file in memory of :data:`_RUN` bytes, all ones."""
    create = getattr(os, "memfd_create", None)
    if create is None:
        return None
    handle = create("qpass-nan", os.MFD_CLOEXEC)
    os.write(handle, b"\xff" * _RUN)
    return handle


def release(parameter: Tensor, name: str) -> int:
    """Free the data of ``parameter``, keeping its shape, dtype and identity; returns the bytes freed.

    Dynamo guards on all three, so they must stay. The new storage is an anonymous mapping that nobody touches: address
    space without memory. (A storage resized to zero frees as much, but an eager read of it crashes the process.)
    """
    if isinstance(parameter, ReleasedParameter):
        return 0
    size = parameter.numel() * parameter.element_size()
    if size == 0:
        return 0
    address = parameter.data_ptr()
    empty = _hollow((parameter.numel(),), parameter.dtype)
    parameter.data = torch.as_strided(empty, parameter.shape, parameter.stride())
    parameter.__class__ = ReleasedParameter
    parameter.qpass_name = name  # type: ignore[attr-defined]
    forget_pages(address, size)
    return size


def forget_pages(address: int, size: int) -> None:
    """Drop the resident pages of a range that lies in a mapped file; do nothing for any other memory.

    Weights are often views of one mapped checkpoint, which stays mapped as long as one of them (an embedding) lives.
    The pages of the others would stay resident with it. They are not lost: a read brings them back from the file.
    """
    begin, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin and _in_file(begin, end):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _in_file(begin: int, end: int) -> bool:
    """Whether one mapping of a file covers the whole range, as Linux tells; False elsewhere."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        span, _permissions, _offset, _device, inode = line.split(maxsplit=5)[:5]
        first, last = (int(part, 16) for part in span.split("-"))
        if first <= begin and end <= last:
            return inode != "0"
    return False


def released_name(parameter: Tensor) -> str | None:
    """The name of a released weight; None for one that still has its data."""
    return parameter.qpass_name if isinstance(parameter, ReleasedParameter) else None


def return_memory() -> None:
    """Give the freed heap back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _flat(args: tuple, kwargs: dict | None) -> list[Any]:
    flat: list[Any] = []
    for value in (*args, *(kwargs or {}).values()):
        flat.extend(value) if isinstance(value, list | tuple) else flat.append(value)
    return flat
