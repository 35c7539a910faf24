"""The eager model that a quantized one must equal: its linears multiply by the dequantized codes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qpass.algorithms.rtn import rtn
from qpass.qweight import QWeight
from qpass.scheme import Scheme


def dequantized(
    model: nn.Module,
    scheme_of: Callable[[str, bool], Scheme],
    change: Callable[[str, QWeight], QWeight] = lambda name, weight: weight,
) -> tuple[nn.Module, list[str]]:
    """A copy of ``model`` with each quantized matrix replaced, and the names of their modules.

    ``change`` may tamper with one site's numbers. Embeddings keep what they read, whatever is tied to them.
    """
    result, names = copy.deepcopy(model), []
    embeddings = {id(m.weight) for m in result.modules() if isinstance(m, nn.Embedding)}
    for name, module in result.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or isinstance(module, nn.Embedding):
            continue
        scheme = scheme_of(name, id(weight) in embeddings)
        if scheme.weight is None:
            continue
        transposed = isinstance(module, Conv1D)  # its weight is [K, N]
        numbers = rtn(weight.detach().t() if transposed else weight.detach(), scheme.weight)
        matrix = change(name, numbers).dequantize().to(weight.dtype)
        module.weight = nn.Parameter(matrix.t().contiguous() if transposed else matrix)
        names.append(name)
    return result, names


def zeros_off_by_one(site: str) -> Callable[[str, QWeight], QWeight]:
    """A ``change`` that moves one module's zeros by one code, up in every other row and down in the rest.

    All rows one way would shift a router's or a softmax's inputs alike, which changes nothing.
    """

    def change(name: str, weight: QWeight) -> QWeight:
        if name != site:
            return weight
        step = 1 - 2 * (torch.arange(weight.n) % 2)[:, None]
        moved = (weight.zeros.int() + step).clamp(0, weight.format.max_code).to(torch.uint8)
        return QWeight(weight.codes, weight.scales, moved, weight.format)

    return change
