"""The page: every number of its figures is a record's, nothing is fetched, nothing a record says becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import browser
import pytest
from typer.testing import CliRunner

from qpass.frontends.cli import app
from qpass.frontends.trace import section_of
from qpass.measure.record import Machine, Record, append
from qpass.measure.report import page
from qpass.measure.report_data import linear_shares, models
from qpass.measure.report_pictures import write

MACHINE = Machine("A & B <cpu>", 2, "avx512_vnni", "2.13")
EVIL = '<script>alert("x")</script><img src=http://x.example/y>'
RATES = {"read_bytes": 3e10, "int8_macs": 4e11, "bf16_macs": 2e11, "int8_tile_macs": 0.0, "bf16_tile_macs": 0.0}
VARIANTS = {"stock": (900.0, 200.5), "w8a16": (950.0, 41.25), "w4a8-g128": (500.0, 26.125), EVIL: (800.0, 60.0)}


def record(what: str, value: float, unit: str, share: float | None = None, **settings: Any) -> Record:
    return Record(what, value, unit, 5, 0.97 * value, 1.04 * value, MACHINE, "abc", {"model": "m", **settings}, share)


def timed(variant: str, ttft: float, tpot: float, **more: Any) -> list[Record]:
    case = {
        "variant": variant,
        "prompt": 128,
        "batch": 1,
        "new": 64,
        "threads": 2,
        "bandwidth_gbps": 30.0,
        "rates": RATES,
    } | more
    case |= {"read_bytes": 9.1e8, "disturbed": [f"because {EVIL}"] if variant == "stock" else []}
    return [record("ttft", ttft, "ms", 0.4, **case), record("tpot", tpot, "ms", 0.8, **case)]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    found = [r for variant, times in VARIANTS.items() for r in timed(variant, *times)]
    found += timed("w4a8-g128 + d", 510.0, 17.5, draft="d", tokens_a_step=3.1)
    for variant, perplexity, passed in (("w8a16", 4.21, 61.0), ("w4a8-g128", 4.43, 57.9)):
        found.append(record("perplexity", perplexity, "perplexity", variant=variant))
        found.append(record("humaneval_pass@1", passed, "%", variant=variant))
    found += [
        record("verify", 25.0 + k, "ms", scheme="w4a8-g128", k=k, plain_ms=25.0, context=512) for k in (0, 1, 4, 8)
    ]
    found += [
        record("linear", ms, "ms", name=name, n=8960, k=1536, m=m, weight_bytes=7_000_000, rates=RATES)
        for name, times in {"w4a8-g128": (0.3, 4.0), "bf16-onednn": (1.2, 9.0)}.items()
        for m, ms in zip((1, 128), times, strict=True)
    ]
    parts = [{"name": "linear", "ms": 20.0, "calls": 9}, {"name": EVIL, "ms": 5.0, "calls": 1}]
    found.append(record("profile", 25.0, "ms", scheme="w4a8-g128", context=512, parts=parts, linears=[]))
    found.append(record("absent", 0.0, "", variant="IPEX", reason=f"no wheel for {EVIL}"))
    trace = {"pieces": [["def", "target", ""], [EVIL, "draft", " x"]], "rounds": [[4, [4], [1], 5.0, 30.0]]}
    found.append(record("trace", 2.0, "tokens", variant="w4a8-g128 + d", **trace, switches=[], text=EVIL))
    return found


@pytest.fixture(scope="module")
def report(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Through the command, as a user makes it."""
    folder = tmp_path_factory.mktemp("report")
    append(folder / "results" / "a.jsonl", records)
    out = CliRunner().invoke(
        app, ["report", str(folder / "results"), "-o", str(folder / "report.html"), "--title", EVIL]
    )
    assert out.exit_code == 0, out.output
    return folder / "report.html"


def figure(root: ElementTree.Element, words: str) -> ElementTree.Element:
    (found,) = (svg for svg in root.iter("svg") if svg.get("aria-label", "").startswith(words))
    return found


def values(svg: ElementTree.Element) -> list[float]:
    return [float(mark.get("data-value", "nan")) for mark in svg.iter() if mark.get("data-value")]


def tree(report: Path) -> ElementTree.Element:
    return ElementTree.fromstring(report.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>\n"))


def test_bars_are_the_records(report: Path) -> None:
    svg = figure(tree(report), "Time a token (TPOT), ms")
    assert values(svg) == [200.5, 41.25, 26.125, 60.0, 17.5]
    widths = [float(rect.get("width", 0)) for rect in svg.iter("rect")]
    assert widths[1] / widths[0] == pytest.approx(41.25 / 200.5, abs=1e-3)
    limits = [float(mark.get("data-limit", 0)) for mark in svg.iter("path") if mark.get("data-limit")]
    assert limits == pytest.approx([0.8 * v for v in values(svg)])
    titles = [title.text for title in svg.iter("title")]
    assert titles[2] == "w4a8-g128: 26.1 ms, p10 25.3, p90 27.2, n = 5; the limit 20.9 ms (80%)"
    assert "its own bound" in str(titles[4])


def test_curves_are_the_records(report: Path, records: list[Record]) -> None:
    root = tree(report)
    assert values(figure(root, "Cost of checking K tokens")) == pytest.approx([1.0, 26 / 25, 29 / 25, 33 / 25])
    assert values(figure(root, "Perplexity against bytes")) == [4.21, 4.43]
    assert values(figure(root, "One step in its parts")) == [20.0, 5.0]
    shares = [linear_shares(r) for r in records if r.what == "linear"]
    for which, words in enumerate(("Share of the memory", "Share of the arithmetic peak")):
        assert values(figure(root, words)) == pytest.approx([pair[which] for pair in shares])
    assert shares[1][1] == pytest.approx(128 * 8960 * 1536 / 4e-3 / 4e11)  # int8's peak for a8, bf16's for the other
    assert shares[3][1] == pytest.approx(128 * 8960 * 1536 / 9e-3 / 2e11)


def test_the_recipe_table(report: Path) -> None:
    table = next(tree(report).iter("table"))
    head = ["".join(cell.itertext()) for cell in table.iter("th")]
    rows = [["".join(cell.itertext()) for cell in row.iter("td")] for row in table.iter("tr")][1:]
    by_name = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert rows[0][0] == "bf16, stock Inductor"
    one = by_name["w4a8-g128"]
    assert (one["TTFT ms"], one["TPOT ms"], one["of the limit"], one["MB read a step"]) == ("500", "26.1", "80%", "910")
    assert one["HumanEval pass@1"].startswith("57.9%")
    assert rows[3][6:8] == ["26.1", "7.67x"] or "7.67x" in rows[2]
    drafted = by_name["w4a8-g128 + d"]
    assert drafted["perplexity"] == "4.430"  # its text is the scheme's
    assert drafted["of the limit"] == "80%*"


def test_nothing_of_a_record_becomes_markup_and_nothing_is_fetched(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    root = tree(report)
    assert EVIL in str(root.findtext(".//title"))
    assert {e.tag for e in root.iter()}.isdisjoint({"script", "img", "link", "iframe", "object"})
    assert "default-src 'none'" in text
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)|url\(|@import""", re.sub(r"&lt;.*?&gt;", "", text))
    assert len(set(re.findall(r' id="([^"]+)"', text))) == len(re.findall(r' id="([^"]+)"', text))
    for svg in (s for s in root.iter("svg") if s.get("role") == "img"):
        assert svg.get("aria-label")
    for word in ("no wheel for", "disturbed", "Who proposed each token", "A &amp; B &lt;cpu&gt;"):
        assert word in text


@pytest.mark.skipif(browser.PROGRAM is None, reason="no chromium")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1200, False)])
def test_a_browser_shows_it_without_a_word(report: Path, tmp_path: Path, width: int, dark: bool) -> None:
    dom, console = browser.open_page(report, tmp_path / "profile", width=width, dark=dark)
    assert console == []
    ours = re.findall(r'data-value="([^"]+)"', report.read_text(encoding="utf-8"))
    assert re.findall(r'data-value="([^"]+)"', dom) == ours
    assert len(ours) > 20
    assert "<script" not in dom


def test_older_names_and_a_missing_baseline() -> None:
    """What older files call "inductor" is stock; without it there are no gains."""
    text = page(timed("inductor", 900.0, 200.0) + timed("w8a16", 900.0, 50.0), "t")
    assert "4.00x" in text
    assert "bf16, stock Inductor" in text
    assert "4.00x" not in page(timed("w8a16", 900.0, 50.0), "t")


def test_quality_of_the_same_processor_counts_whatever_its_cores() -> None:
    alone = replace(record("perplexity", 4.5, "perplexity", scheme="w8a16"), machine=replace(MACHINE, cores=1))
    other = replace(record("perplexity", 9.5, "perplexity", scheme="w4a8-g128"), machine=replace(MACHINE, tier="avx2"))
    found = models([*timed("w8a16", 900.0, 50.0), alone, other])
    assert [list(m.quality) for m in found] == [["w8a16"], ["w4a8-g128"]]
    assert [bool(m.cases) for m in found] == [True, False]  # another instruction set's results may be others


def test_pictures_and_markdown_for_a_readme(tmp_path: Path, records: list[Record]) -> None:
    paths = write([replace(r, settings={**r.settings, "model": "a/b"}) for r in records], tmp_path / "p")
    assert [p.name for p in paths] == ["a-b.md", "a-b-prompt-128x1.png"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    text = paths[0].read_text()
    assert "| `w4a8-g128` | 57.9% | 4.430 | 500 (1.80x) [40%] | 26.1 (7.67x) [80%] | 910 |" in text
    assert "p90 at most 1.07 of p10" in text


def test_what_is_no_record_is_told(tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert run(app, ["report", str(tmp_path), "-o", str(tmp_path / "r.html")]).exit_code == 2
    (tmp_path / "a.jsonl").write_text("no\n")
    out = run(app, ["report", str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "r.html")])
    assert (out.exit_code, "a.jsonl:1 is not a record" in " ".join(out.stderr.split())) == (2, True)
    assert run(app, ["report", str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "r.pdf")]).exit_code == 2
    assert not (tmp_path / "r.html").exists()


def test_a_trace_is_a_section_of_its_own() -> None:
    settings = {"pieces": [["a", "target", ""]], "rounds": [], "switches": [], "text": "p"}
    assert section_of(settings, "one").count('id="one"') == 1
