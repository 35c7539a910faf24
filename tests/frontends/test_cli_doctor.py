"""``qpass doctor``: a row for each thing that matters, and advice where one is amiss."""

import dataclasses

import pytest

import qpass.cpu
from qpass.errors import KernelError
from qpass.frontends.commands import doctor
from qpass.measure import bandwidth


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QPASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bandwidth, "measure_bandwidth_gbps", lambda: 20.0)


def _row(name):
    return next(finding for finding in doctor.findings() if finding.name == name)


def _cpu(monkeypatch, **changes):
    changed = dataclasses.replace(qpass.cpu.detect(), **changes)
    monkeypatch.setattr(qpass.cpu, "detect", lambda: changed)


def test_all_rows_are_there_and_none_fails_here():
    found = list(doctor.findings())
    assert [f.name for f in found][:3] == ["system", "CPU", "ISA tier"]
    assert not [f for f in found if f.level == "fail"]
    assert all(f.advice for f in found if f.level != "ok")


def test_amx_without_permission(monkeypatch):
    _cpu(monkeypatch, isa=frozenset({"amx_tile"}), amx_permitted=False)
    assert (_row("AMX").level, _row("AMX").value) == ("warn", "present, not permitted")
    assert "5.16" in _row("AMX").advice


def test_a_cap_and_an_old_cpu_are_told(monkeypatch):
    _cpu(monkeypatch, cap="avx2")
    assert "unset it" in _row("ISA tier").advice
    _cpu(monkeypatch, isa=frozenset(), cap=None)
    assert "reference lowering" in _row("ISA tier").advice


def test_a_missing_compiler_fails(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert _row("compiler").level == "fail"
    assert "/no/such/compiler" in _row("compiler").advice
    assert doctor.doctor() is False


def test_a_cache_that_others_may_write_fails(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert _row("cache folder").level == "fail"
    (tmp_path / "cache").chmod(0o755)
    assert _row("cache folder").level == "warn"
    assert "chmod 700" in _row("cache folder").advice


def test_attention_is_native_or_the_reason_is_told(monkeypatch):
    tier = qpass.cpu.detect().tier
    if tier != "none":
        assert (_row("attention").level, _row("attention").value) == ("ok", f"native {tier}")
    _cpu(monkeypatch, isa=frozenset(), cap=None, name="Pentium")
    assert (_row("attention").level, _row("attention").value) == ("warn", "plain torch, slow")
    assert _row("attention").advice == "the attention kernel needs AVX2; this CPU is Pentium with tier none"


def test_little_bandwidth_is_told(monkeypatch):
    monkeypatch.setattr(bandwidth, "measure_bandwidth_gbps", lambda: 2.0)
    assert _row("read bandwidth").level == "warn"


def test_a_check_that_crashes_is_a_row():
    def crash():
        raise ZeroDivisionError("oh")

    assert doctor._guarded("x", crash) == doctor.Finding("x", "unknown", "ZeroDivisionError: oh", "warn")

    def refuse():
        raise KernelError("no")

    assert doctor._guarded("x", refuse).level == "fail"
