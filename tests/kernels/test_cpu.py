"""Which tier a machine has, and how QPASS_ISA caps it."""

from __future__ import annotations

import pytest

from qpass.cpu import _NEEDS, TIERS, Cpu, Tier, detect
from qpass.errors import OptionError

EVERYTHING = frozenset().union(*_NEEDS.values())
ZEN4 = _NEEDS["avx512_vnni"] | {"avx512_bf16"}
ALDER_LAKE = _NEEDS["avx_vnni"]


def machine(isa: frozenset[str], cap: Tier | None = None, permitted: bool = True) -> Cpu:
    return Cpu("a machine", "someone", isa, 2, amx_permitted=permitted, cap=cap)


@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_needs_its_flags(tier: Tier) -> None:
    assert machine(_NEEDS[tier]).tier == tier
    for flag in _NEEDS[tier]:
        assert TIERS.index(machine(_NEEDS[tier] - {flag}).tier) < TIERS.index(tier)


@pytest.mark.parametrize("cap", TIERS[1:])
def test_a_cap_lowers_the_tier_and_never_raises_it(cap: Tier) -> None:
    assert machine(EVERYTHING, cap).tier == cap
    assert machine(_NEEDS["avx2"], cap).tier == "avx2"


def test_tiers_are_not_nested() -> None:
    """A machine has the richest tier whose needs it meets, whatever it lacks of the others."""
    caps = TIERS[1:]
    assert [machine(ZEN4, cap).tier for cap in caps] == ["avx2", "avx2", "avx512", "avx512_vnni", "avx512_vnni"]
    assert [machine(ALDER_LAKE, cap).tier for cap in caps] == ["avx2", *["avx_vnni"] * 4]
    assert not machine(ZEN4).runs("avx_vnni")
    assert machine(ZEN4, "avx2").runs("avx512_vnni")


def test_amx_needs_the_kernels_permission() -> None:
    assert machine(EVERYTHING).tier == "amx"
    assert machine(EVERYTHING, permitted=False).tier == "avx512_vnni"


def test_detect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QPASS_ISA", raising=False)
    cpu = detect()
    assert cpu is detect()
    assert cpu.cores >= 1
    assert cpu.name
    assert 16 << 10 <= cpu.l1d_bytes <= cpu.l2_bytes
    monkeypatch.setenv("QPASS_ISA", "avx2")
    assert detect().tier in ("none", "avx2")
    monkeypatch.setenv("QPASS_ISA", "sse")
    with pytest.raises(OptionError, match="QPASS_ISA=sse: accepted are avx2, avx_vnni, avx512, avx512_vnni, amx"):
        detect()
