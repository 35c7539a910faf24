"""The linear layers of a model that a choice of schemes quantizes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qpass.assignment import Assignment
from qpass.errors import OptionError, UnsupportedError
from qpass.lowering.released import released_name
from qpass.scheme import Format, Scheme


@dataclass(frozen=True)
class Layer:
    """A linear layer that is to be quantized."""

    name: str
    module: nn.Module
    scheme: Scheme
    transposed: bool  # transformers' Conv1D holds [K, N]

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    def format(self) -> Format:
        assert self.scheme.weight is not None
        return self.scheme.weight

    @property
    def k(self) -> int:
        return self.parameter.shape[0 if self.transposed else 1]

    def read(self) -> Tensor:
        """[N, K]"""
        weight = self.parameter.detach()
        return weight.t() if self.transposed else weight

    def write(self, weight: Tensor) -> None:
        self.parameter.detach().copy_(weight.t() if self.transposed else weight)


def layers_of(model: nn.Module, assignment: Assignment) -> list[Layer]:
    """The linear layers that the assignment quantizes, each Parameter once."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"qpass.quantize takes an nn.Module, not {type(model).__name__}")
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: list[Layer] = []
    taken: set[int] = set()
    names: list[str] = []
    for name, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D"
        weight = getattr(module, "weight", None)
        if not (isinstance(module, nn.Linear) or transposed) or not isinstance(weight, nn.Parameter):
            continue
        names.append(name)
        scheme = assignment(name, id(weight) in tables)
        if scheme.weight is None or id(weight) in taken:
            continue
        check_weight(name, weight)
        taken.add(id(weight))
        found.append(Layer(name, module, scheme, transposed))
    assignment.check(names)
    if not found:
        raise OptionError("there is no linear layer to quantize")
    experts = [name for name, p in model.named_parameters() if p.dim() == 3 and p.shape[0] > 1]
    if experts:
        more = f" and {len(experts) - 1} more" if len(experts) > 1 else ""
        warnings.warn(f"{experts[0]}{more}: 3-D expert weights are not quantized", stacklevel=3)
    return found


def check_weight(name: str, weight: nn.Parameter) -> None:
    if released_name(weight) is not None:
        raise OptionError(f"{name}: its full-precision data was released; load the model again to quantize it")
    if weight.device.type != "cpu":
        raise UnsupportedError(f"{name} is on {weight.device}; qpass works on the CPU: move the model with .to('cpu')")
    if not weight.is_floating_point() or weight.itemsize < 2:
        raise UnsupportedError(f"{name}: its weight is {weight.dtype}; accepted: bfloat16, float16, float32")
    if not bool(torch.isfinite(weight).all()):
        raise OptionError(f"{name}: its weight holds NaN or infinity")
