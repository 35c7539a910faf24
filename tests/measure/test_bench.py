"""Bench: turns with the limits between them, shares by the rates around a turn, disturbances told, records as they come."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qpass.cpu import Rates
from qpass.errors import QpassError
from qpass.frontends.cli import app
from qpass.frontends.commands import bench_costs, session
from qpass.frontends.commands.bench_variants import BASELINES, STOCK, Calibrated, _generate, work_of
from qpass.kernels.rates import measured_rates
from qpass.measure import bench, bench_machine
from qpass.measure.bench import Contender, Outcome, Work, measure_case
from qpass.measure.bench_verify import measure_verification
from qpass.measure.record import Record, read
from qpass.runtime.decoder import Decoder
from qpass.runtime.ngram import NgramDraft
from qpass.runtime.speculate import Speculator

sys.path.insert(0, str(Path(__file__).parents[1] / "frontends"))
import tiny_checkpoint

GBPS = 1e9


def rates(gbps: float) -> Rates:
    return Rates(gbps * GBPS, int8_macs=4e12, bf16_macs=1e12, vector_ops=1.0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A machine whose read rate is what the list says, one number a look; quiet, as /proc tells."""
    seen: list[float] = []
    monkeypatch.setattr(bench_machine, "measure", lambda cpu: rates(seen.pop(0)))
    monkeypatch.setattr(bench_machine, "measured_cpu", lambda: None)
    monkeypatch.setattr(bench_machine, "processor_ticks", lambda processes: bench_machine.Ticks())
    return seen


def test_the_least_work() -> None:
    work = Work(weight_bytes=1000, kv_bytes=10, macs=300, head_macs=50, attention_macs=4, peak="int8")
    assert work.token_bytes(context=20, batch=3) == 1000 + 3 * 20 * 10
    linears, attention = 2 * (8 * 300 + 50) / 4e12, 2 * 4 * (8 * 9 / 2) / 1e12
    assert work.prompt_seconds(8, 2, rates(1)) == pytest.approx(linears + attention)


def test_a_share_is_of_the_rates_around_its_turn(machine: list[float]) -> None:
    """Two rounds of a and b: looks before each turn and behind the last."""
    machine += [10, 20, 30, 40, 50]
    work = Work(30_000_000, 0, 0, 0, 0, "bf16")
    order: list[str] = []

    def contender(name: str, tpot_ms: float) -> Contender:
        def generate(ids: Any, new: int) -> Outcome:
            order.append(name)
            return Outcome(5.0, tpot_ms)

        return Contender(name, generate, work)

    ids = torch.zeros(2, 8, dtype=torch.int64)
    records = list(measure_case([contender("a", 4.0), contender("b", 8.0)], ids, 4, 2, {"threads": 2}))
    found = {(r.what, r.settings["variant"]): r for r in records}
    assert order == ["a", "b"] * 3
    # a's turns lie between 10 and 20, and 30 and 40; b's between 20 and 30, and 40 and 50 GB/s
    limits = {"a": [30e6 / (g * GBPS) for g in (15, 35)], "b": [30e6 / (g * GBPS) for g in (25, 45)]}
    for name, ms in (("a", 4.0), ("b", 8.0)):
        assert found["tpot", name].share_of_limit == pytest.approx(1e3 * sum(limits[name]) / 2 / ms)
        assert found["throughput", name].value == pytest.approx(2 * 1e3 / ms)
    settings = found["tpot", "a"].settings
    assert (settings["prompt"], settings["batch"], settings["new"], settings["bandwidth_gbps"]) == (8, 2, 4, 30.0)
    assert settings["disturbed"] == []


def test_a_draft_is_held_against_its_own_bound(machine: list[float]) -> None:
    machine += [10] * 9
    outcomes = iter(
        [Outcome(1.0, ms, {"bound_ms": 3.0, "tokens_a_step": 2.0}, {"pieces": []}) for ms in (9.0, 4.0, 6.0)]
    )
    one = Contender("w + d", lambda ids, new: next(outcomes), Work(1, 0, 0, 0, 0, "bf16"), {"draft": "d"})
    found = {r.what: r for r in measure_case([one], torch.zeros(1, 4).long(), 4, 2, {"threads": 1, "model": "m"})}
    assert found["tpot"].share_of_limit == pytest.approx(3.0 / 5.0)
    assert found["tpot"].settings["draft"] == "d"
    assert (found["trace"].value, found["trace"].settings["pieces"]) == (2.0, [])
    assert "pieces" not in found["tpot"].settings


def test_disturbances_are_sentences(machine: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = [bench_machine.Ticks(), bench_machine.Ticks(total=1000, busy=700, steal=60, own=400)]
    monkeypatch.setattr(bench_machine, "processor_ticks", lambda processes: ticks[0] if len(ticks) > 1 else ticks[-1])
    watch = bench_machine.Watch()
    ticks.pop(0)
    assert watch.shares() == {"steal": 0.06, "others": 0.3}
    assert watch.disturbances("tpot", 10.0, 14.0) == [
        "tpot varies from 10 to 14 (p10, p90)",
        "the host gave 6% of the processor time to others",
        "other processes took 30% of the processor time",
    ]
    ticks[:] = [bench_machine.Ticks(total=1000, busy=420, steal=1, own=400)]
    assert watch.disturbances("tpot", 10.0, 11.0) == []


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc")
def test_own_time_is_counted_as_own() -> None:
    before = bench_machine.processor_ticks((os.getpid(), 2**30))
    started = time.process_time()
    while time.process_time() < started + 0.15:
        sum(range(100_000))
    after = bench_machine.processor_ticks((os.getpid(), 2**30))
    assert (after.own - before.own) / os.sysconf("SC_CLK_TCK") == pytest.approx(time.process_time() - started, abs=0.05)
    assert after.total > before.total
    assert after.busy - before.busy >= after.own - before.own - 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock without Inductor: what the commands do with a variant is the same. The machine is looked at once."""
    monkeypatch.setattr(session, "baseline", lambda model=None, frozen=False: lambda function: function)
    monkeypatch.setattr(bench_machine, "measure", lambda cpu: measured_rates())


def test_the_command_writes_records_and_prints_a_table(folder: Path, tmp_path: Path, eager: None) -> None:
    path = tmp_path / "r.jsonl"
    arguments = ["--schemes", "stock", "--prompt-len", "8,12", "--batch", "1,2", "--new", "4", "--rounds", "2"]
    out = CliRunner().invoke(app, ["bench", str(folder), *arguments, "-o", str(path)])
    assert out.exit_code == 0, out.output
    found = list(read(path))
    assert [r.what for r in found] == ["ttft", "tpot", "throughput"] * 4
    assert {(r.settings["prompt"], r.settings["batch"]) for r in found} == {(8, 1), (12, 1), (8, 2), (12, 2)}
    tpot = found[1]
    assert (tpot.n, tpot.settings["variant"], tpot.settings["model"]) == (2, "stock", folder.name)
    assert 0 < tpot.share_of_limit < 1.5
    assert (
        tpot.settings["read_bytes"] == tpot.settings["weight_bytes"] + 10 * 2 * 2 * 2 * 2 * 16
    )  # 8 + 4 / 2 tokens of 2 layers, heads
    assert out.stdout.count("TPOT ms") == 4
    assert "12-token prompt, batch 2, 4 new tokens, n = 2 in turns" in " ".join(out.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--schemes", "w5a3"), "unknown scheme 'w5a3'"),
        (("--schemes", ","), "--schemes is empty"),
        (("--prompt-len", "8,x"), "--prompt-len x: accepted are whole numbers"),
        (("--batch", "0"), "--batch 0: accepted"),
        (("--draft-with", "stock"), "give one with --draft"),
        (("--draft", "ngram", "--draft-with", "w3a8"), "--draft-with w3a8 is not among"),
        (("--stats-with", "w3a8-g64"), "--stats-with w3a8-g64 is no scheme with int8 activations among"),
        (("--schemes", "w4a8-g128", "--stats-with", "w4a8-g128"), "give statistics with --stats"),
        (("--schemes", "recipe"), "a recipe needs both --recipe FILE"),
        (("--text", "/does/not/exist"), "does not exist"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_loaded(arguments: tuple[str, ...], message: str) -> None:
    out = CliRunner().invoke(app, ["bench", "/no/model", *arguments])
    assert out.exit_code == 2
    assert message in " ".join(out.stderr.split())


def test_the_work_of_a_model_and_what_became_of_guesses(folder: Path) -> None:
    from qpass.frontends.hf import load

    loaded = load(folder)
    decoder = Decoder(loaded.model)
    work = work_of(loaded, decoder, STOCK)
    vocabulary, layer = 258, 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    assert (work.head_macs, work.macs) == (64 * vocabulary, 2 * layer)
    assert work.weight_bytes == 2 * (2 * layer + 64 * vocabulary)
    assert work.attention_macs == 2 * 4 * (16 + 16)  # layers, heads, key and value
    assert (work.kv_bytes, work.peak) == (2 * 2 * 2 * 16 * 2, "bf16")
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    out = _generate(Speculator(decoder, NgramDraft(), k=2), loaded.tokenizer, ids, 12)
    assert out.about["tokens_a_step"] >= 1
    assert out.about["bound_ms"] > 0
    assert sum(len(piece[0]) > 0 for piece in out.trace["pieces"]) > 0
    assert sum(1 + sum(accepted) for _, _, accepted, *_ in out.trace["rounds"]) >= 11
    assert _generate(Speculator(decoder), None, ids, 3).trace is None
    verified = measure_verification(decoder, {"scheme": "s"}, context=16, widths=(1, 3), rounds=2)
    assert [r.settings["k"] for r in verified] == [0, 1, 3]
    assert all(r.settings["plain_ms"] == verified[0].value for r in verified)


def test_statistics_go_to_the_schemes_that_take_them() -> None:
    calibrated = Calibrated(Path("s.stats"), "0.5", Path("r.json"))
    assert calibrated.name("w8a8-dynamic") == "w8a8-dynamic (smoothed)"
    assert calibrated.of("w8a8-static")["stats"] == Path("s.stats")
    assert (calibrated.name("w8a16"), calibrated.of("w8a16")["stats"]) == ("w8a16", None)
    assert (calibrated.of("recipe")["scheme"], calibrated.of("recipe")["recipe"]) == (None, Path("r.json"))
    few = Calibrated(Path("s.stats"), only=["w8a8-static"])
    assert few.stats_for("w8a8-static") == few.stats_for("recipe") == Path("s.stats")
    assert (few.name("w4a8-g128"), few.stats_for("w4a8-g128")) == ("w4a8-g128", None)


@pytest.mark.parametrize("variant", BASELINES)
def test_costs_of_one_process(folder: Path, eager: None, variant: str) -> None:
    found = bench_costs.once(str(folder), variant, 8, Calibrated())
    assert set(found) == {"load", "peak_load", "compile", "peak_compile", "peak_run", "rss"}
    assert min(found.values()) > 0
    assert found["peak_run"] >= 0.9 * found["rss"] > 50  # MB: torch alone is more


def test_costs_that_fail_are_told() -> None:
    with pytest.raises(QpassError, match=r"stock ended with code 1: .*/does/not/exist"):
        list(bench_costs.measure_costs("/does/not/exist", STOCK, prompt=8))


def test_a_record_is_never_lost(folder: Path, tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before a failure is in the file and on the terminal."""
    real, path = bench.measure_case, tmp_path / "r.jsonl"

    def measured(contenders: Any, ids: Any, *rest: Any) -> Any:
        if ids.shape[1] == 12:
            raise QpassError("the second prompt fails")
        yield from real(contenders, ids, *rest)

    monkeypatch.setattr(bench, "measure_case", measured)
    arguments = ["--schemes", "stock", "--prompt-len", "8,12", "--new", "3", "--rounds", "1", "-o", str(path)]
    out = CliRunner().invoke(app, ["bench", str(folder), *arguments])
    assert out.exit_code == 2
    assert [r.what for r in read(path)] == ["ttft", "tpot", "throughput"]
    assert "TPOT ms" in out.stdout
    assert isinstance(next(read(path)), Record)
