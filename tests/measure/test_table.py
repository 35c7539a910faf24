"""The README's tables are what the Records say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qpass.measure import table
from qpass.measure.record import Machine, Record
from qpass.measure.report_data import models

ROOT = Path(__file__).parents[2]


def record(what: str, variant: str, value: float, **more: object) -> Record:
    settings = {"model": "m", "variant": variant, "prompt": 8, "new": 4, "threads": 2, "bandwidth_gbps": 30.0}
    return Record(what, value, "ms", 3, value, value, Machine("cpu", 2, "amx", "2.13"), "abc", settings, **more)  # type: ignore[arg-type]


def test_readme_is_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text()
    assert table.updated(readme, ROOT / "benchmarks" / "results") == readme


def run(when: str, *records: Record, **more: object) -> list[Record]:
    return [replace(r, settings={**r.settings, "run": when, **more}) for r in records]


def test_recipes_of_the_newest_run_with_quality_from_any() -> None:
    """What was not measured in turns does not share a table."""
    quality = replace(record("perplexity", "", 6.5), settings={"model": "m", "scheme": "w4a16-g128"})
    records = [
        *run("2", record("tpot", "stock", 100.0)),
        *run("2", record("tpot", "w4a16-g128", 25.0, share_of_limit=0.8), read_bytes=9e8),
        *run("1", record("tpot", "w4a16-g128", 60.0), record("tpot", "w8a16", 70.0)),
        *run("0", record("tpot", "w8a16", 40.0), batch=4),
        record("tpot", "w2a16-g32", 1.0),
        quality,
    ]
    text = table.recipes_markdown(records)
    assert "| bf16, stock Inductor | - | - | 100 | - |\n" in text
    assert "| `w4a16-g128` | 6.500 | - | 25.0 (4.00x) [80%] | 900 |" in text
    assert "70.0" not in text
    assert "w2a16" not in text
    assert "batch 4, greedy" in text
    assert text.endswith("| `w8a16` | - | 40.0 |")


def test_other_engines_have_a_table_of_their_own() -> None:
    theirs = run("3", record("tpot", "stock", 90.0), record("tpot", "w8a16", 45.0))
    theirs += run("3", record("tpot", "llama.cpp Q8_0", 50.0), peer=True)
    ours = run("2", record("tpot", "stock", 100.0), record("tpot", "w8a16", 40.0))
    with pytest.raises(ValueError, match="no run with other engines"):
        table.recipes_markdown(ours, peers=True)
    text = table.recipes_markdown(ours + theirs, peers=True)
    assert "| llama.cpp Q8_0 | - | 50.0 (1.80x) |" in text
    assert "| `w8a16` | - | 45.0 (2.00x) |" in text
    assert "llama" not in table.recipes_markdown(ours + theirs)
    (model,) = models(ours + theirs)
    assert [(case.beside, case.rows[0].records["tpot"].value) for case in model.cases] == [(False, 100.0), (True, 90.0)]


def test_frozen_weights_are_the_baseline_where_stock_is_not() -> None:
    text = table.recipes_markdown(run("1", record("tpot", "stock-frozen", 80.0), record("tpot", "w8a16", 40.0)))
    assert "| bf16, Inductor with frozen weights | - | 80.0 |\n| `w8a16` | - | 40.0 (2.00x) |" in text


def test_what_comes_before_the_first_token() -> None:
    """Variants whose memory was not measured are left out."""
    whole = [replace(record(what, "w4a16-g128", float(i + 1)), unit="s") for i, what in enumerate(table.COSTS)]
    text = table.costs_markdown([*whole, record("compile_cold", "w8a16", 9.0)])
    assert text.endswith("| `w4a16-g128` | 1 | 2 | 3 | 4 |")
    with pytest.raises(ValueError, match="no record of compile time"):
        table.costs_markdown(whole[:2])


def linear(name: str, m: int, ms: float, n: int = 8960) -> Record:
    return replace(record("linear", "", ms), settings={"name": name, "n": n, "k": 1536, "m": m})


def test_linear_layers() -> None:
    """The last record of a scheme and M; other shapes, M and ways of walking a call have no place."""
    other = replace(linear("w8a16", 1, 7.0), what="linear-path")
    strangers = [other, linear("w8a16", 1, 8.0, n=1536), linear("w8a16", 3, 8.0), linear("bf16", 1, 8.0)]
    text = table.linear_markdown(
        [linear("w8a16", 1, 9.0), linear("w8a16", 1, 0.456), linear("int8pack", 512, 110.8), *strangers]
    )
    assert "| 1 | - | - | - | - | 0.46 | - | - | - | - |" in text
    assert "| 512 | - | - | - | - | - | - | - | - | 111 |" in text
    assert "| 3 |" not in text
    assert "medians of 3 to 3 turns" in text
    with pytest.raises(ValueError, match="no record of a linear layer from 1536 to 8960"):
        table.linear_markdown([other])


def test_each_machine_has_a_table_of_its_own() -> None:
    there = replace(linear("w8a16", 1, 0.3), machine=Machine("other", 2, "avx2", "2.13"))
    strangers = [replace(there, what="linear-path", machine=Machine("third", 2, "avx2", "2.13"))]
    text = table.of_each_machine([linear("w8a16", 1, 0.5), there, *strangers], "linear", table.linear_markdown)
    first, second = text.split("\n\n| tokens", 1)[0], text.rpartition("In milliseconds")[2]
    assert "cpu (amx)" in first
    assert "other (avx2)" in second
    assert "0.30" in second
    assert "0.50" not in second
    with pytest.raises(ValueError, match="no record of linear"):
        table.of_each_machine(strangers, "linear", table.linear_markdown)


def test_marks_are_needed() -> None:
    for part in (table.RESULTS, table.PEERS, table.COST, table.LINEAR):
        with pytest.raises(ValueError, match=f"{part}: begin"):
            table.insert("no marks", "table", part)


def speculation(variant: str, ms: float, **more: object) -> Record:
    about = {
        "model": "m",
        "draft": "d",
        "draft_scheme": "w8a8-dynamic",
        "draft_vocabulary": 32768,
        "k": "auto",
        "new": 9,
        "threads": 2,
    }
    about |= {
        "variant": variant,
        "overall_tpot_ms": ms,
        "bound_ms": 0.9 * ms,
        "read_ms": 0.0,
        "tokens_a_step": 1.0,
    } | more
    return replace(record("speculation_tpot", "", ms), settings=about)


def test_speculation() -> None:
    """Times over the baseline's; the last record of a variant; verification over a plain step."""
    verify = [
        replace(record("verify", "", ms), settings={"scheme": "w4a8-g128", "k": k, "plain_ms": 30.0, "context": 512})
        for k, ms in ((0, 30.0), (4, 33.0))
    ]
    text = table.speculation_markdown(
        [
            speculation("w4a8-g128 model", 99.0),
            speculation("w4a8-g128 model", 20.0, read_ms=179.0, tokens_a_step=3.2),
            speculation("inductor", 220.0),
            *verify,
        ]
    )
    assert "| `w4a8-g128` | model | 3.20 | 20.0 | 11.0x | 90% | 179 |" in text
    assert "| bf16, stock Inductor | - | 1.00 | 220.0 | 1.0x | 90% | - |" in text
    assert "at 512 tokens of context: 1.10 (K = 4)." in text
    with pytest.raises(ValueError, match="no record of speculative decoding"):
        table.speculation_markdown(verify)
