"""Weights whose full-precision data is gone: compiled graphs never read them, and whoever else does gets a clear error."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import ReleasedWeightError

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
        "_is_view",
    ]
)
"""What may be asked of a released weight: everything that doesn't look at its values."""


class ReleasedParameter(nn.Parameter):
    """A Parameter with a shape and no values. Any read raises :class:`ReleasedWeightError`, which names it."""

    qpass_name: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not torch.compiler.is_compiling():
            name = getattr(func, "__name__", "")
            if name == "__get__":
                name = getattr(func.__self__, "__name__", "")
            if name not in _HARMLESS:
                released = next((a for a in _flat(args, kwargs) if isinstance(a, ReleasedParameter)), None)
                if released is not None:
                    raise ReleasedWeightError(
                        f"{released.qpass_name}: its full-precision data was released after packing (release_weights=True); only "
                        "the compiled model can use it. Load the model again, or compile with release_weights=False"
                    )
        return super().__torch_function__(func, types, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"ReleasedParameter({self.qpass_name}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict) -> Any:
        return self.__torch_function__(torch.Tensor.__deepcopy__, (type(self),), (self,))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__torch_function__(torch.Tensor.__reduce_ex__, (type(self),), (self,))


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
    empty = torch.frombuffer(mmap.mmap(-1, size), dtype=parameter.dtype)
    parameter.data = torch.as_strided(empty, parameter.shape, parameter.stride())
    parameter.__class__ = ReleasedParameter
    parameter.qpass_name = name  # type: ignore[attr-defined]
    _forget_pages(address, size)
    return size


def _forget_pages(address: int, size: int) -> None:
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
