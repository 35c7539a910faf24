"""``qpass::quantized_linear``: a linear layer over codes. Its ten lines of plain torch are what every lowering must match."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qpass.ops.epilogue import apply_epilogue, check_activation, fake_output
from qpass.ops.linear import LIBRARY
from qpass.ops.prologue import apply_norm_of, check_quantizer
from qpass.qactivation import quantize_activation, quantize_by_scale, rotated
from qpass.qweight import QWeight
from qpass.scheme import Format

LIBRARY.define(
    "quantized_linear(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor? bias, int bits, int group, str rule,"
    " str activation='none', bool glu=False, Tensor? mul=None, Tensor? residual=None, str norm='none',"
    " Tensor? norm_weight=None, Tensor? norm_bias=None, float norm_eps=0.0, float? x_scale=None, Tensor? outliers=None,"
    " Tensor? outlier_weight=None, float? y_scale=None, ScalarType? dtype=None, bool rotate=False, bool y_rotate=False,"
    " float x_shift=0.0, float y_shift=0.0) -> Tensor"
)


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
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    x_scale: float | None = None,
    outliers: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    y_scale: float | None = None,
    dtype: torch.dtype | None = None,
    rotate: bool = False,
    y_rotate: bool = False,
    x_shift: float = 0.0,
    y_shift: float = 0.0,
) -> Tensor:
    """``x [..., K]``, a QWeight [N, K] by its tensors (``group`` 0: per channel), ``bias`` [N]; out [..., N] in x's dtype.

    ``rule`` is the scheme's activation: a16 multiplies x as it is; a8-token, a8-token-group and a8-static (by ``x_scale``)
    quantize it first. With a ``norm`` (over K, by fp32 ``norm_weight`` and ``norm_bias`` [K]) the rows of x are normalized
    in fp32 before either: rounded once to x's dtype for a16, not at all for a8.

    ``outliers`` int64 [C], of a8 rules: inputs that are zero in what is quantized, and multiplied by ``outlier_weight``
    [C, N] as they are. With ``y_scale`` out is the int8 codes that a8-static makes of it; such an x is multiplied by ``x_scale`` as it is,
    and ``dtype`` names what out and the epilogue's operands have instead of its own. ``rotate``: x is rotated (:func:`~qpass.qactivation.rotated`)
    before it is quantized, an int8 one was already; ``y_rotate``: so is out, before it becomes codes.

    ``x_shift`` (a8-static): ``x - x_shift`` is what is quantized and multiplied, and ``bias`` has what the shift gives; an int8 x was
    shifted already. ``y_shift``: so is out, before it is rotated and becomes codes.
    """
    check_activation(activation)
    check_quantizer(rule, x_scale, x_shift)
    weight = QWeight(
        codes, scales, zeros, Format(bits, group or None, float_zeros=zeros.is_floating_point())
    ).dequantize()
    dtype, x = dtype or x.dtype, apply_norm_of(x, rule, norm, norm_weight, norm_bias, norm_eps)
    rows = x.reshape(-1, x.shape[-1]).float()
    apart: Tensor | None = None
    if outliers is not None and outlier_weight is not None:
        apart = rows[:, outliers] @ outlier_weight.float()
        rows = rows.index_fill(1, outliers, 0.0)
    if x.dtype != torch.int8:
        rows = rows - x_shift if x_shift else rows
        rows = rotated(rows) if rotate else rows
    if x_scale is not None:
        rows = (rows if x.dtype == torch.int8 else quantize_by_scale(rows, x_scale)[0]) * x_scale
    elif rule != "a16":
        length = group if rule == "a8-token-group" and group else rows.shape[1]
        values, act_scales = quantize_activation(rows, length)
        rows = values * act_scales.repeat_interleave(length, dim=1)[:, : rows.shape[1]]
    y = rows @ weight.t()
    if apart is not None:
        y = y + apart
    if bias is not None:
        y = y + bias.float()
    y = y.view(*x.shape[:-1], codes.shape[0])
    y = apply_epilogue(y, activation, glu, mul, residual)
    return round_output(y, dtype, y_scale, y_shift, y_rotate)


def round_output(y: Tensor, dtype: torch.dtype, y_scale: float | None, y_shift: float, y_rotate: bool) -> Tensor:
    """fp32 ``y`` in ``dtype``, or as int8 codes of ``y_scale``, shifted and rotated."""
    if y_scale is None:
        return y.to(dtype)
    y = y - y_shift if y_shift else y
    y = rotated(y) if y_rotate else y
    values, _ = quantize_by_scale(y.reshape(-1, y.shape[-1]), y_scale)
    return values.to(torch.int8).view(y.shape)


def _fake(
    x: Tensor,
    codes: Tensor,
    *args: Any,
    glu: bool = False,
    y_scale: float | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Tensor:
    return fake_output(x, codes.shape[0], args[7] if len(args) > 7 else glu, dtype, y_scale)


LIBRARY.impl("quantized_linear", _quantized_linear, "CompositeExplicitAutograd")
torch.library.register_fake("qpass::quantized_linear", _fake, lib=LIBRARY)


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """A quantized_linear node's arguments by name, defaults filled in."""
    schema = torch.ops.qpass.quantized_linear.default._schema
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}
