"""What a plan may say, and what no kernel takes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from kernel_cases import FORMATS

from qpass.cpu import _NEEDS, Cpu, Tier
from qpass.kernels import plan
from qpass.kernels.format import KernelFormat
from qpass.kernels.plan import Shape


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
    a8, a16 = KernelFormat(4, 128, "a8-token-group", 2), KernelFormat(4, 128, "a16", 2)
    assert plan.plan(Shape(512, 8960, 1536), a8, amx).path == "tiles"
    assert plan.paths(a16, "amx", 1) == ("tiles",)  # the vector paths would round otherwise than a prompt
    assert plan.plan(Shape(1, 64, 128), a16, vnni).weight_bytes == 64 * 64 + 128 + 64
    with pytest.raises(ValueError, match="tier none"):
        plan.plan(Shape(1, 64, 128), a16, Cpu("x", "y", frozenset(), 2))


def plan_isa(tier: Tier) -> frozenset[str]:
    return _NEEDS[tier]


def test_no_torch_in_plan_source_build_store() -> None:
    code = "import sys, qpass.kernels.plan, qpass.kernels.source, qpass.kernels.build, qpass.kernels.store, qpass.cpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
