"""Records: what was measured survives the file; turns are taken; memory is told."""

import subprocess
import sys

import pytest

from qpass.errors import CheckpointError
from qpass.measure.latency import measure
from qpass.measure.record import Record, append, quantile, read


class _Fake:
    def __init__(self, ttft_ms, token_ms):
        self.ttft_ms, self.token_ms = ttft_ms, token_ms


def test_quantiles():
    assert quantile([1, 2, 3], 0.5) == 2
    assert quantile([1, 2], 0.5) == 1.5
    assert quantile([7], 0.9) == 7


def test_a_record_survives_the_file(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    first = Record.of("tpot", [3.0, 1.0, 2.0], "ms", {"scheme": "w8a16"}, limit=1.0)
    assert (first.median, first.n, first.share_of_limit) == (2.0, 3, 0.5)
    assert first.p10 < first.value < first.p90
    append(path, [first])
    append(path, [Record.of("ttft", [5.0], "ms")])
    assert next(read(path)) == first
    assert [r.what for r in read(path)] == ["tpot", "ttft"]


@pytest.mark.parametrize("line", ["not json", "{}", "[1]", '{"machine": {}}'])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "records.jsonl"
    append(path, [Record.of("x", [1.0], "ms")])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match=r"records.jsonl:2 is not a record"):
        list(read(path))


def test_nothing_observed_is_an_error():
    with pytest.raises(ValueError, match="nothing was observed"):
        Record.of("x", [], "ms")


def test_variants_take_turns_and_the_warm_up_is_left_out():
    order = []

    def variant(name, times):
        def generate():
            order.append(name)
            return _Fake(times.pop(0), [10.0, 20.0, 90.0])

        return generate

    records = measure(
        {"a": variant("a", [99, 1, 2, 3]), "b": variant("b", [99, 5, 5, 5])}, rounds=3, limits_ms={"a": 10.0}
    )
    assert order == ["a", "b"] * 4
    found = {(r.what, r.settings["variant"]): r for r in records}
    assert found["ttft", "a"].value == 2
    assert found["ttft", "b"].value == 5
    assert found["tpot", "a"].value == 40  # from the first token to the last, over the tokens between
    assert found["tpot", "a"].share_of_limit == 0.25
    assert found["tpot", "b"].share_of_limit is None


def test_memory_is_told_in_bytes():
    """In a process of its own: in this one the allocator may hand out memory that is resident already."""
    code = (
        "from qpass.measure.memory import *; a = resident_bytes(); held = bytearray(64 << 20); held[::4096] = b'x' * (64 << 8);"
        "b = resident_bytes(); del held; p = peak_bytes(); r = reset_peak(); print(b - a, p - b, r, peak_bytes() - resident_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, above, reset, left = done.stdout.split()
    assert 60 << 20 < int(grown) < 80 << 20
    assert abs(int(above)) < 8 << 20
    assert reset == "False" or int(left) < 8 << 20
