"""Weights as codes: from a stored layer to a Parameter without values, and back to the artefact's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qpass.checkpoints import artefact
from qpass.checkpoints.bits import pack_bits, unpack_bits
from qpass.checkpoints.stored import StoredLinear
from qpass.lowering.given import Given, give, given_of
from qpass.lowering.released import ReleasedParameter, without_values
from qpass.qweight import QWeight, zero_dtype


def in_memory(weight: QWeight) -> Callable[[], QWeight]:
    """A reader of codes that are kept dense, so that four bits take four."""
    codes, scales = pack_bits(weight.codes, weight.format.bits), artefact.compact_scales(weight.scales)
    zeros = None if weight.format.symmetric else weight.zeros
    shape, k, format = weight.zeros.shape, weight.k, weight.format

    def read() -> QWeight:
        middle = 1 << format.bits - 1
        zero = torch.full(shape, middle, dtype=zero_dtype(format)) if zeros is None else zeros
        return QWeight(unpack_bits(codes, format.bits, k), scales.float(), zero, format)

    return read


def parameter_of(name: str, linear: StoredLinear, dtype: torch.dtype) -> ReleasedParameter:
    """A weight without values, with the layer's codes."""
    parameter = without_values(linear.shape, dtype, name)
    parameter.qpass_eager = _eager_linear
    give(parameter, given_from(linear))
    return parameter


def _eager_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from qpass.frontends.eager import eager_linear  # with it comes Dynamo, which merely loading a model doesn't need

    return eager_linear(x, weight, bias)


def given_from(linear: StoredLinear) -> Given:
    return Given(
        linear.format,
        linear.read,
        linear.divisor,
        linear.order,
        linear.activation,
        linear.source or "an artefact",
        origin=linear.origin,
    )


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model's tensors as the artefact has them, and the table of its quantized layers.

    A table that an embedding reads keeps its values: a tied head is quantized again when it is compiled.
    """
    state: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        given = given_of(parameter)
        if given is None or id(parameter) in tables or not name.endswith(".weight"):
            state[name] = parameter.detach()
            continue
        given.check(parameter, name)
        module, (n, k) = name.removesuffix(".weight"), parameter.shape
        stored = (given.divisor, given.order, given.activation, given.source)
        tensors, modules[module] = artefact.to_tensors(StoredLinear(given.format, (n, k), given.read, *stored))
        state |= {f"{module}.{part}": tensor for part, tensor in tensors.items()}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                state[f"{prefix}.{name}" if prefix else name] = buffer
    return state, modules
