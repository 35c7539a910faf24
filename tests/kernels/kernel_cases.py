"""Random weights, and what a kernel must compute from them: fp64 over the same codes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import qpass.ops  # noqa: F401
from qpass.cpu import Tier, detect
from qpass.kernels import load
from qpass.kernels.format import BITS, GROUPS, RULES, KernelFormat
from qpass.kernels.pack import pack
from qpass.kernels.plan import NEVER, SERVED, Tuning, a16_by_int8

CPU = detect()
SERVES = CPU.tier in SERVED

PLAIN, PAIRS = "avx512_vnni-plain", "avx512_vnni-pairs"
"""AVX-512 VNNI without BF16, VBMI and GFNI (Cascade Lake), and with dot products of bf16 that are worth taking (Zen 4)."""

_VARIANTS = {
    PLAIN: replace(CPU, isa=CPU.isa - {"avx512_bf16", "avx512vbmi", "gfni"}),
    PAIRS: replace(CPU, vendor="AuthenticAMD"),
}

EMULATED: dict[Tier, Tier] = {"avx_vnni": "avx512_vnni", "amx": "avx512_vnni"}
"""What a machine without the tier needs to run its emulation."""

TIERS = [tier for tier in SERVED if CPU.runs(tier) or CPU.runs(EMULATED.get(tier, tier))]
"""Those whose code, real or emulated, runs here."""


def _format(bits: int, group: int | None, rule: str) -> KernelFormat:
    return KernelFormat(bits, group, "a8-token" if rule == "a8-token-group" and not group else rule, 2 if group else 4)


FORMATS = list(
    dict.fromkeys(_format(bits, group, rule) for bits, group, rule in itertools.product(sorted(BITS), GROUPS, RULES))
)
"""Every bits x group x rule."""


def covering(turn: int) -> list[KernelFormat]:
    """Twenty formats with every pair of (bits, group), (bits, rule) and (group, rule): a Latin square of rules."""
    return [
        _format(bits, group, RULES[(b + g + turn) % len(RULES)])
        for (b, bits), (g, group) in itertools.product(enumerate(sorted(BITS)), enumerate(GROUPS))
    ]


FLOAT_ZEROS: dict[str, list[KernelFormat]] = {
    "avx512_vnni": [
        KernelFormat(4, 32, "a16", 2, 4),
        KernelFormat(4, 32, "a8-token-group", 2, 4),
        KernelFormat(3, 64, "a8-token", 4, 4),
        KernelFormat(8, None, "a8-static", 4, 4),
    ],
    "avx2": [KernelFormat(4, 32, "a8-token-group", 2, 4)],
    "avx_vnni": [KernelFormat(2, 16, "a8-token-group", 4, 4)],
    "amx": [KernelFormat(4, 32, "a8-token-group", 2, 4), KernelFormat(8, None, "a16", 4, 4)],
}
"""Zeros that are no codes change how sums begin and end, which each rule and tier does its own way."""


INTEGER_SCALES: dict[str, list[KernelFormat]] = {
    tier: [KernelFormat(bits, group, rule, 1) for bits, group, rule in cases]
    for tier, cases in {
        "avx2": [(4, 128, "a8-token"), (3, 16, "a8-static")],
        "avx_vnni": [(4, 32, "a8-token")],
        "avx512": [(4, 128, "a8-token"), (2, 64, "a8-token")],
        "avx512_vnni": [(4, 128, "a8-token"), (3, 64, "a8-token"), (3, 16, "a8-token"), (2, 32, "a8-static")],
        "amx": [(4, 128, "a8-token"), (4, 64, "a8-static"), (3, 32, "a8-token"), (2, 16, "a8-token")],
    }.items()
}
"""Groups that meet a scale an output: each has its way of making operands."""


def _cases() -> list[tuple[KernelFormat, str]]:
    """What the slow tests run: every format on the machine's own tier, which other tests ask for too; on each other tier a
    covering, whose turns differ so that all formats but a few meet one of them; of AVX-512 VNNI's variants only what they
    change, a16.

    A unit costs two to three seconds to compile, which is nearly all that these tests cost. Several formats in one unit
    would not be faster (measured: four in 8.3 s, one by one 8.6 s)."""
    chosen: dict[str, list[KernelFormat]] = {
        "avx2": covering(0),
        "avx_vnni": covering(1),
        "avx512": covering(2),
        PLAIN: [_format(bits, group, "a16") for bits, group in zip(sorted(BITS), GROUPS[1:], strict=True)],
        PAIRS: [_format(bits, group, "a16") for bits, group in zip(sorted(BITS), GROUPS[:4], strict=True)],
        "avx512_vnni": covering(3),
        "amx": covering(3),
    }
    if CPU.tier in chosen:
        chosen[CPU.tier] = FORMATS
    for extra in (FLOAT_ZEROS, INTEGER_SCALES):
        for tier, formats in extra.items():
            chosen[tier] = chosen[tier] + formats
    runs = [tier for tier in chosen if _real(tier) in TIERS and (tier != PAIRS or "avx512_bf16" in CPU.isa)]
    return [(format, tier) for tier in runs for format in chosen[tier]]


def _real(tier: str) -> Tier:
    return next(each for each in SERVED if each == tier.partition("-")[0])


CASES = _cases()
A8_CASES = [(format, tier) for format, tier in CASES if format.rule != "a16"]

BARS = {torch.bfloat16: 45.0, torch.float16: 60.0, torch.float32: 100.0}

X_SCALE = 0.03
"""The static scale of a8-static's cases: normal inputs reach 150 of it, so that some are clamped."""


WALKS = [Tuning(0, NEVER, NEVER), Tuning(NEVER, NEVER, NEVER), Tuning(0, 1, NEVER), Tuning(0, NEVER, 1)]
"""Vectors abreast, in stored order, by a panel, by tiles: wherever the unit has them."""


def name_of(format: KernelFormat) -> str:
    return format.name


def over(cases: list[tuple[KernelFormat, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("format", "tier"), cases, ids=[f"{tier}-{format.name}" for format, tier in cases])


def use(*formats: KernelFormat, tier: str = CPU.tier) -> None:
    """Serve these formats with the kernels of ``tier`` (the machine's own by default) from now on."""
    real = _real(tier)
    load.ensure(*formats, cpu=_VARIANTS.get(tier, CPU), tier=real, emulate=not CPU.runs(real))


def by_int8(format: KernelFormat, tier: str) -> bool:
    """Whether 16-bit activations become int8 terms there."""
    return a16_by_int8(format, _VARIANTS.get(tier, CPU), _real(tier))


@dataclass
class Weight:
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    format: KernelFormat
    glu: bool = False

    @classmethod
    def random(cls, n: int, k: int, format: KernelFormat, glu: bool = False, power_of_two: bool = False) -> Weight:
        groups, top = format.groups(k), 1 << format.bits
        codes = torch.randint(0, top, (n, k), dtype=torch.uint8)
        zeros = torch.randint(top // 4, 3 * top // 4, (n, groups), dtype=torch.uint8)
        if format.zero_bytes == 4:
            zeros = (
                zeros + torch.randint(0, 4, zeros.shape) * 0.25
            )  # quarters: what is exact with codes is exact with them
        scales = (torch.rand(n, groups) * 0.01 + 0.005).half().float()
        if power_of_two:
            scales = torch.exp2(torch.randint(-8, -4, (n, groups)).float())
        if format.integer_scales:
            top = 1 << format.bits
            most = (127 // torch.maximum(zeros.int() + 1, top - zeros.int())).clamp(max=15)
            times = (torch.rand(n, groups) * most).int() + 1
            scales = times * (scales[:, :1] if power_of_two else (torch.rand(n, 1) * 0.01 + 0.005).half().float())
        return cls(codes, scales, zeros, format, glu)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def packed(self) -> Tensor:
        return pack(self.codes, self.scales, self.zeros, self.format, self.glu)

    def dense(self) -> Tensor:
        """fp64 [N, K]."""
        k = self.shape[1]
        length = self.format.group or k
        zeros, scales = (t.double().repeat_interleave(length, 1)[:, :k] for t in (self.zeros, self.scales))
        return (self.codes.double() - zeros) * scales

    def with_zero_off_by_one(self) -> Weight:
        zeros = self.zeros.clone()
        zeros[:, zeros.shape[1] // 2] += 1
        return replace(self, zeros=zeros)


def quantized(x: Tensor, format: KernelFormat, x_scale: float = X_SCALE) -> tuple[Tensor, Tensor]:
    """The int8 values [M, K] and their scales [M, K], both fp32, of an a8 rule."""
    k = x.shape[1]
    if format.rule == "a8-static":
        scale = torch.full_like(x, x_scale, dtype=torch.float32)
        return (x.float() * (torch.ones_like(scale) / scale)).round().clamp(-127, 127), scale
    length = k if format.rule == "a8-token" else format.group
    assert length is not None
    padded = torch.nn.functional.pad(x.float(), (0, -k % length)).view(x.shape[0], -1, length)
    amax = padded.abs().amax(2, keepdim=True)
    amax = torch.where(amax > 0, amax, torch.full_like(amax, 127.0))
    inverse = torch.full_like(amax, 127.0) / amax  # 127.0 / amax would be a reciprocal times 127
    values = (padded * inverse).round().clamp(-127, 127)
    scales = (amax / torch.full_like(amax, 127.0)).expand_as(padded)
    return values.reshape(x.shape[0], -1)[:, :k], scales.reshape(x.shape[0], -1)[:, :k]


def product(x: Tensor, weight: Weight, x_scale: float = X_SCALE) -> Tensor:
    """fp64 [M, N]: x, as the activation rule sees it, times the weight."""
    if weight.format.rule == "a16":
        return x.double() @ weight.dense().t()
    values, scales = quantized(x, weight.format, x_scale)
    return (values.double() * scales.double()) @ weight.dense().t()


def run(
    x: Tensor,
    weight: Weight,
    *,
    bias: Tensor | None = None,
    mul: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
    packed: Tensor | None = None,
    **prologue: object,
) -> Tensor:
    n, k = weight.shape
    packed = weight.packed() if packed is None else packed
    if weight.format.rule == "a8-static":
        prologue.setdefault("x_scale", X_SCALE)
    return torch.ops.qpass.packed_linear(
        x, packed, bias, mul, residual, n, k, weight.format.number, activation, weight.glu, **prologue
    )


def sqnr_db(reference: Tensor, result: Tensor) -> float:
    error = (reference.double() - result.double()).square().sum().item()
    signal = reference.double().square().sum().item()
    return math.inf if error == 0 else -math.inf if not math.isfinite(error) else 10 * math.log10(signal / error)
