"""``qpass::quantized_linear``: a linear layer over codes. Its ten lines of plain torch are what every lowering must match."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qpass.ops.epilogue import apply_epilogue, check_activation, fake_output
from qpass.ops.linear import LIBRARY
from qpass.qweight import QWeight
from qpass.scheme import Format

LIBRARY.define(
    "quantized_linear(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor? bias, int bits, int group, str rule,"
    " str activation='none', bool glu=False, Tensor? mul=None, Tensor? residual=None) -> Tensor"
)


def quantize_activation(x: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric int8: values [M, K] as fp32 integers in -127..127 and scales [M, K/G].

    Each token (``group`` None: K inputs) or each group of a token is scaled by its own largest magnitude, so a row's
    result depends on no other row. A group of zeros has scale 1.
    """
    m, k = x.shape
    length = k if group is None else group
    padded = torch.nn.functional.pad(x.float(), (0, -k % length)).view(m, -1, length)
    amax = padded.abs().amax(dim=2)
    amax = torch.where(amax > 0, amax, torch.full_like(amax, 127.0))
    inverse = torch.full_like(amax, 127.0) / amax  # `127.0 / amax` would be a rounded reciprocal times 127
    values = (padded * inverse[..., None]).round().clamp_(-127, 127)
    return values.view(m, -1)[:, :k], amax / 127.0


def _quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
    rule: str,
    activation: str = "none",
    glu: bool = False,
    mul: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``x [..., K]``, a QWeight [N, K] by its tensors (``group`` 0: per channel), ``bias`` [N]; out [..., N] in x's dtype.

    ``rule`` is the scheme's activation: a16 multiplies x as it is, a8-token and a8-token-group quantize it first.
    """
    check_activation(activation)
    weight = QWeight(codes, scales, zeros, Format(bits, group or None)).dequantize()
    rows = x.reshape(-1, x.shape[-1]).float()
    if rule != "a16":
        values, act_scales = quantize_activation(rows, group if rule == "a8-token-group" else None)
        length = rows.shape[1] if act_scales.shape[1] == 1 else group
        rows = values * act_scales.repeat_interleave(length, dim=1)[:, : rows.shape[1]]
    y = rows @ weight.t()
    if bias is not None:
        y = y + bias.float()
    y = y.view(*x.shape[:-1], codes.shape[0])
    return apply_epilogue(y, activation, glu, mul, residual).to(x.dtype)


def _fake(x, codes, scales, zeros, bias, bits, group, rule, activation="none", glu=False, mul=None, residual=None):  # type: ignore[no-untyped-def]
    return fake_output(x, codes.shape[0], glu)


LIBRARY.impl("quantized_linear", _quantized_linear, "CompositeExplicitAutograd")
torch.library.register_fake("qpass::quantized_linear", _fake, lib=LIBRARY)


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """A quantized_linear node's arguments by name, defaults filled in."""
    schema = torch.ops.qpass.quantized_linear.default._schema
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}
