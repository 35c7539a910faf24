"""A token's time by scheme: timed once, the same ever after; the model's word where the clock has none."""

from __future__ import annotations

import json

import pytest

from qpass.cpu import detect
from qpass.errors import KernelError
from qpass.kernels.plan import SERVED
from qpass.measure import token_times
from qpass.measure.token_times import predicted_seconds, token_seconds
from qpass.scheme import Scheme

CPU = detect()
SCHEMES = [Scheme.parse(name) for name in ("w16a16", "w8a16", "w8a8-static", "w4a8-g64")]
N, K = 2048, 1024

pytestmark = pytest.mark.skipif(CPU.tier not in SERVED, reason="needs AVX2")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The kernels as they are, times in a folder of the test's own."""
    monkeypatch.setattr(token_times, "cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def clock(monkeypatch):
    """Stands in for the clock: gives what the test says, and counts."""
    calls: list[tuple[int, int]] = []

    def install(answer):
        def timed(n, k, schemes):
            calls.append((n, k))
            return answer(n, k, schemes)

        monkeypatch.setattr(token_times, "_timed", timed)
        return calls

    return install


def predicted(factor=1.0):
    return lambda n, k, schemes: {s.name: factor * predicted_seconds(n, k, s, CPU) for s in schemes}


def test_the_clock_is_asked_once(cache, clock) -> None:
    calls = clock(predicted(1.5))
    first = token_seconds(N, K, SCHEMES, CPU)
    assert first == pytest.approx(predicted(1.5)(N, K, SCHEMES))
    clock(predicted(2.0))
    assert token_seconds(N, K, SCHEMES, CPU) == first
    assert calls == [(N, K)]
    token_seconds(N, 2 * K, SCHEMES, CPU)
    token_seconds(N, K, SCHEMES[:2], CPU)
    assert calls == [(N, K), (N, 2 * K), (N, K)]
    assert len(list(cache.glob("times/*.json"))) == 3


def test_four_bytes_take_twice_the_time(cache, clock) -> None:
    clock(predicted())
    two, four = (token_seconds(N, K, SCHEMES, CPU, size) for size in (2, 4))
    assert four["w16a16"] == 2 * two["w16a16"]
    assert four["w8a16"] == two["w8a16"]


def test_a_small_layer_is_not_timed(cache, clock) -> None:
    calls = clock(predicted(2.0))
    assert token_seconds(64, 64, SCHEMES, CPU) == predicted()(64, 64, SCHEMES)
    assert not calls


def test_a_disturbed_clock_is_not_believed(cache, clock) -> None:
    calls = clock(predicted(10.0))
    assert token_seconds(N, K, SCHEMES, CPU) == predicted()(N, K, SCHEMES)
    assert len(calls) == token_times.TRIES
    assert not list(cache.glob("times/*"))


def test_without_a_compiler_the_model_speaks(cache, clock) -> None:
    def refuse(n, k, schemes):
        raise KernelError("no compiler")

    clock(refuse)
    assert token_seconds(N, K, SCHEMES, CPU) == predicted()(N, K, SCHEMES)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"w16a16": "x"}', json.dumps({s.name: -1 for s in SCHEMES})])
def test_a_damaged_file_is_measured_anew(cache, clock, text) -> None:
    clock(predicted(1.5))
    wanted = token_seconds(N, K, SCHEMES, CPU)
    (file,) = cache.glob("times/*.json")
    file.write_text(text)
    assert token_seconds(N, K, SCHEMES, CPU) == wanted
    assert json.loads(file.read_text()) == wanted


def test_a_cache_that_is_a_file_costs_the_answer_nothing(tmp_path, monkeypatch, clock) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setattr(token_times, "cache_folder", lambda: tmp_path / "cache")
    clock(predicted(1.5))
    assert token_seconds(N, K, SCHEMES, CPU) == pytest.approx(predicted(1.5)(N, K, SCHEMES))


def test_the_real_clock() -> None:
    """Every scheme runs, static scales too."""
    found = token_times._timed(N, K, SCHEMES)
    assert found.keys() == {s.name for s in SCHEMES}
    assert all(1e-6 < seconds < 0.1 for seconds in found.values())


def test_the_folder_is_this_users_alone(cache, clock) -> None:
    clock(predicted())
    token_seconds(N, K, SCHEMES, CPU)
    assert (cache / "times").stat().st_mode & 0o777 == 0o700
