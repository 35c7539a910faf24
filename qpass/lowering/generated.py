"""The kernels that qpass makes for this CPU: codes of 2, 3, 4 and 8 bits, any M, prologue and epilogue inside."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from qpass.cpu import Cpu
from qpass.errors import KernelError
from qpass.kernels import load, plan, tuning
from qpass.kernels.build import find_compiler
from qpass.kernels.format import KernelFormat
from qpass.kernels.pack import pack, scale_bytes
from qpass.kernels.rates import measured_rates
from qpass.kernels.search import search
from qpass.lowering.site import ANY, Site
from qpass.ops.epilogue import activation_number
from qpass.ops.norm import NORMS
from qpass.ops.packed_linear import DTYPES
from qpass.ops.quantized_linear import bound_arguments
from qpass.qweight import QWeight
from qpass.scheme import Format

_ALIKE = (
    "norm_weight",
    "norm_bias",
    "norm_eps",
    "x_scale",
    "outliers",
    "outlier_weight",
    "y_scale",
    "rotate",
    "y_rotate",
    "x_shift",
    "y_shift",
)
"""Arguments that packed_linear takes as quantized_linear has them."""


class Generated:
    name = "generated"
    portable = True

    def same_rows(self, site: Site, cpu: Cpu) -> int:
        """Integer sums are exact in any order and the rest is pinned; AMX rounds bf16 products in its own way, so all calls use it."""
        return ANY

    def refuse(self, site: Site, cpu: Cpu) -> str | None:
        weight = site.scheme.weight
        if weight is None:
            return "serves quantized weights only"
        if cpu.tier not in plan.SERVED:
            return f"needs AVX2 with FMA, F16C and BMI2, or better; this CPU is {cpu.name} with tier {cpu.tier}"
        if site.dtype not in DTYPES:
            return f"serves float32, bfloat16 and float16, not {str(site.dtype).removeprefix('torch.')}"
        try:
            find_compiler()
        except KernelError as error:
            return str(error)
        try:
            format = _formats(weight, site.scheme.activation)[-1]
        except ValueError as error:
            return str(error)
        return plan.refuse(format, site.k)

    def pack(self, weight: QWeight, *, glu: bool) -> tuple[Tensor, ...]:
        formats = _formats(weight.format, "a8-token" if weight.format.integer_scales else "a16")
        format = formats[0] if scale_bytes(weight.scales) == formats[0].scale_bytes else formats[-1]
        return (pack(weight.codes, weight.scales, weight.zeros, format, glu),)

    def emit(self, graph: fx.Graph, node: fx.Node, packed: tuple[fx.Node, ...]) -> fx.Node:
        args = bound_arguments(node)
        n, k = _tensor(graph, args["codes"]).shape
        size = _tensor(graph, packed[0]).numel()
        zeros = _tensor(graph, args["zeros"])
        scheme = node.meta.get("qpass_scheme")  # the tensors of integer scales look like those of others
        integer_scales = scheme is not None and scheme.weight.integer_scales
        weight = Format(args["bits"], args["group"] or None, False, zeros.is_floating_point(), integer_scales)
        format = next(f for f in _formats(weight, args["rule"]) if f.packed_bytes(n, k, args["glu"]) == size)
        load.ensure(format)
        operands = (args["x"], packed[0], args["bias"], args["mul"], args["residual"])
        numbers = (n, k, format.number, activation_number(args["activation"]), args["glu"])
        others = {name: args[name] for name in _ALIKE if args[name]}
        if args["norm"] != "none":
            others["norm"] = NORMS.index(args["norm"])
        if args["dtype"] is not None:
            others["dtype"] = DTYPES.index(args["dtype"])
        with graph.inserting_before(node):
            return graph.call_function(torch.ops.qpass.packed_linear.default, (*operands, *numbers), others)

    def predict_ms(self, site: Site, m: int, packed: tuple[Tensor, ...], cpu: Cpu) -> float:
        """What the performance model says of a call with M tokens; the first on a machine settles how it is walked."""
        weight = site.scheme.weight
        assert weight is not None
        formats = _formats(weight, site.scheme.activation)
        format = next(f for f in formats if f.packed_bytes(site.n, site.k, site.glu) == packed[0].numel())
        if not site.glu and tuning.kept(format, cpu, cpu.tier) is None:
            search(packed[0], site.n, site.k, format, cpu)
        rated = replace(cpu, rates=measured_rates())
        return 1e3 * plan.plan(plan.Shape(m, site.n, site.k, site.glu), format, rated).seconds


def _formats(weight: Format, rule: str) -> tuple[KernelFormat, ...]:
    """With float16 and with fp32 scales, or with integer ones. Raises ValueError for a combination that no kernel has."""
    if weight.group is None and rule == "a8-token-group":
        rule = "a8-token"  # one group a token is the token
    zero_bytes, sizes = 4 if weight.float_zeros else 1, (1,) if weight.integer_scales else (2, 4)
    return tuple(KernelFormat(weight.bits, weight.group, rule, size, zero_bytes) for size in sizes)


def _tensor(graph: fx.Graph, node: fx.Node) -> Tensor:
    """The tensor behind a ``get_attr`` node."""
    value: object = graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value
