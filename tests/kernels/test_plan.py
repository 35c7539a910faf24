"""What a plan may say, and what no kernel takes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from kernel_cases import FORMATS

from qpass.cpu import _NEEDS, Cpu, Rates, Tier
from qpass.kernels import plan
from qpass.kernels.format import KernelFormat
from qpass.kernels.plan import Shape
from qpass.kernels.source import kernel_unit


def test_sums_that_could_overflow_are_refused() -> None:
    channel = KernelFormat(8, None, "a8-token", 4)
    assert plan.refuse(channel, 66304) is None  # 255 * 127 * K is just below 2^31
    assert "overflow" in str(plan.refuse(channel, 66368))
    assert plan.refuse(KernelFormat(8, 128, "a8-token", 2), 1 << 20) is None
    assert plan.refuse(KernelFormat(8, None, "a16", 4), 1 << 20) is None


def test_plan_names_a_path_that_the_unit_has() -> None:
    vnni = Cpu("x", "y", plan_isa("avx512_vnni"), 2)
    amx = Cpu("x", "y", plan_isa("amx"), 2, amx_permitted=True, rates=plan.AMX_RATES)
    for format in FORMATS:
        for cpu in (vnni, amx):
            for m in (1, 4, 64, 65, 512):
                path = plan.plan(Shape(m, 64, 128), format, cpu).path
                assert path in plan.paths(format, cpu.tier, m)
                assert plan.tuning(format, cpu).path(format, cpu.tier, m) in plan.paths(format, cpu.tier, m)
    a8, a16 = KernelFormat(4, 128, "a8-token-group", 2), KernelFormat(4, 64, "a16", 2)
    assert plan.plan(Shape(512, 8960, 1536), a8, amx).path == "tiles"
    assert plan.paths(a16, "amx", 1) == ("tiles",)  # the vector paths would round otherwise than a prompt
    assert plan.plan(Shape(1, 64, 128), a16, vnni).weight_bytes == 64 * 64 + 2 * (128 + 64)
    with pytest.raises(ValueError, match="tier none"):
        plan.plan(Shape(1, 64, 128), a16, Cpu("x", "y", frozenset(), 2))


@pytest.mark.parametrize(
    ("vendor", "tier", "bf16", "expected"),
    [
        ("GenuineIntel", "avx512_vnni", False, True),  # Cascade Lake, Ice Lake
        ("GenuineIntel", "avx512_vnni", True, True),  # Sapphire Rapids under a hypervisor that hides its tiles
        ("GenuineIntel", "avx_vnni", False, True),  # Alder Lake
        ("AuthenticAMD", "avx512_vnni", True, False),  # Zen 4
        ("GenuineIntel", "amx", True, True),
        ("GenuineIntel", "avx512", False, False),  # no dot products of int8 to take
        ("AuthenticAMD", "avx2", False, False),
    ],
)
def test_where_16_bits_are_int8_terms(vendor: str, tier: Tier, bf16: bool, expected: bool) -> None:
    isa = plan_isa(tier) | ({"avx512_bf16"} if bf16 else set())
    cpu = Cpu("x", vendor, frozenset(isa), 2, amx_permitted=True, rates=Rates(30e9, 700e9, 80e9, 12e9, 6e12, 3e12))
    assert plan.a16_by_int8(KernelFormat(4, 128, "a16", 2), cpu, tier) == expected
    assert plan.a16_by_int8(KernelFormat(8, None, "a16", 4), cpu, tier) == expected
    assert plan.a16_by_int8(KernelFormat(4, 64, "a16", 2), cpu, tier) == (expected and tier != "amx")
    assert not plan.a16_by_int8(KernelFormat(8, None, "a8-token", 4), cpu, tier)
    assert f"QPASS_A16_BY_INT8 {int(expected)}" in kernel_unit(KernelFormat(4, 128, "a16", 2), cpu, tier).text
    assert "QPASS_A16_BY_INT8 0" in kernel_unit(KernelFormat(4, 128, "a8-token", 2), cpu, tier).text
    a8, a16 = (plan.plan(Shape(512, 8960, 1536), KernelFormat(4, 128, r, 2), cpu) for r in ("a8-token", "a16"))
    if expected:  # two rows a token
        assert a16.limit_seconds == pytest.approx(2 * a8.limit_seconds)
        assert 1.5 * a8.seconds < a16.seconds < 2.5 * a8.seconds


def test_pages_in_turns_on_intel() -> None:
    for vendor, pages in (("GenuineIntel", 8), ("AuthenticAMD", 0)):
        cpu = Cpu("x", vendor, plan_isa("avx512_vnni"), 2)
        assert plan.blocking(cpu).prefetch_pages == pages
        assert f"QPASS_PREFETCH_PAGES {pages}" in kernel_unit(KernelFormat(4, 128, "a8-token", 2), cpu).text


def plan_isa(tier: Tier) -> frozenset[str]:
    return _NEEDS[tier]


def test_no_torch_in_plan_source_build_store() -> None:
    code = "import sys, qpass.kernels.plan, qpass.kernels.source, qpass.kernels.build, qpass.kernels.store, qpass.cpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
