"""How far two results may be apart, and why."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, result: Tensor) -> float:
    """Signal over error, in decibels; infinite for equal tensors."""
    reference, result = reference.double(), result.double()
    error = (reference - result).square().sum().item()
    return math.inf if error == 0 else 10 * math.log10(reference.square().sum().item() / error)


def assert_rounding_apart(reference: object, result: object, dtype: torch.dtype = torch.float32) -> None:
    """Equal but for the order of roundings: a fused epilogue rounds once where separate nodes round at each step.

    A handful of roundings of relative size 2^-24 (fp32) or 2^-9 (bf16) leave more than 110 and 40 dB.
    """
    bar = 110 if dtype == torch.float32 else 40
    if isinstance(reference, tuple | list):
        assert isinstance(result, tuple | list)
        assert len(reference) == len(result)
        for a, b in zip(reference, result, strict=True):
            assert_rounding_apart(a, b, dtype)
    elif isinstance(reference, Tensor):
        assert isinstance(result, Tensor)
        assert (reference.shape, reference.dtype) == (result.shape, result.dtype)
        if reference.is_floating_point():
            assert torch.equal(reference, result) or sqnr_db(reference, result) > bar
        else:
            assert torch.equal(reference, result)
    else:
        assert reference == result
