"""The regression check: ratios inside each file, noise left alone, what is better named as such."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from qpass.frontends.cli import app
from qpass.measure.compare import compare
from qpass.measure.record import Machine, Record, append

MACHINE = Machine("cpu", 2, "amx", "2.13")


def record(what: str, variant: str, value: float, spread: float = 0.01, unit: str = "ms", **more: Any) -> Record:
    settings = {"model": "m", "prompt": 128, "variant": variant, "bandwidth_gbps": value, **more}
    return Record(what, value, unit, 5, value * (1 - spread), value * (1 + spread), MACHINE, "c", settings)


def verdicts(old: list[Record], new: list[Record], tolerance: float = 0.03) -> dict[str, str]:
    return {f"{c.what} {c.settings['variant']}": c.verdict(tolerance) for c in compare(old, new)}


def test_a_machine_that_is_slower_as_a_whole_is_no_regression() -> None:
    old = [record("tpot", "stock", 200.0), record("tpot", "w4", 25.0), record("tpot", "w8", 40.0)]
    new = [record("tpot", "stock", 300.0), record("tpot", "w4", 37.5), record("tpot", "w8", 80.0)]
    assert verdicts(old, new) == {"tpot w4": "same", "tpot w8": "worse"}
    (w4,) = (c for c in compare(old, new) if c.settings["variant"] == "w4")
    assert (w4.over, w4.old[1], w4.factor) == ("stock", 0.125, pytest.approx(1.0))


def test_noise_is_no_change() -> None:
    """The ratio's ends come from both rows' p10 and p90."""
    old = [record("tpot", "stock", 200.0), record("tpot", "w4", 25.0, spread=0.2)]
    assert verdicts(old, [record("tpot", "stock", 200.0), record("tpot", "w4", 32.0, spread=0.2)]) == {
        "tpot w4": "same"
    }
    assert verdicts(old, [record("tpot", "stock", 200.0), record("tpot", "w4", 40.0)]) == {"tpot w4": "worse"}
    assert verdicts(old, [record("tpot", "stock", 200.0, 0.5), record("tpot", "w4", 40.0)]) == {"tpot w4": "same"}


def test_more_of_some_things_is_better() -> None:
    old = [record("throughput", "w4", 40.0, unit="tokens/s"), record("perplexity", "w4", 10.0, 0, unit="")]
    new = [record("throughput", "w4", 50.0, unit="tokens/s"), record("perplexity", "w4", 11.0, 0, unit="")]
    assert verdicts(old, new) == {"throughput w4": "better", "perplexity w4": "worse"}
    assert verdicts(new, old) == {"throughput w4": "worse", "perplexity w4": "better"}


def test_a_row_with_a_draft_is_held_against_one_without() -> None:
    old = [record("tpot", "stock", 200.0), record("tpot", "w4 + d", 20.0, draft="d", k="auto")]
    new = [record("tpot", "stock", 100.0), record("tpot", "w4 + d", 20.0, draft="d", k="auto")]
    assert verdicts(old, new) == {"tpot w4 + d": "worse"}


def test_other_cases_are_other_rows_and_the_last_record_counts() -> None:
    old = [record("tpot", "w4", 99.0), record("tpot", "w4", 25.0), record("tpot", "w4", 70.0, batch=4)]
    assert verdicts(old, [record("tpot", "w4", 25.0)]) == {"tpot w4": "same"}


def test_the_command_names_what_got_worse_and_ends_with_one(tmp_path) -> None:
    old, new, other = (tmp_path / f"{name}.jsonl" for name in ("old", "new", "other"))
    append(old, [record("tpot", "stock", 200.0), record("tpot", "[red]w4", 25.0), record("ttft", "gone", 1.0)])
    append(new, [record("tpot", "stock", 200.0), record("tpot", "[red]w4", 50.0)])
    append(other, [record("rss", "w4", 1.0)])
    run = CliRunner().invoke
    out = run(app, ["compare", str(old), str(new)])
    assert out.exit_code == 1, out.output
    assert "tpot [red]w4" in out.stdout
    assert "+100.0%" in out.stdout
    assert "only in old.jsonl: ttft gone" in out.stdout
    assert run(app, ["compare", str(old), str(old)]).exit_code == 0
    assert run(app, ["compare", str(new), str(old)]).exit_code == 0  # better is no regression
    out = run(app, ["compare", str(old), str(other)])
    assert out.exit_code == 2
    assert "nothing in common" in " ".join(out.stderr.split())
    assert run(app, ["compare", str(old), str(tmp_path / "none.jsonl")]).exit_code == 2
