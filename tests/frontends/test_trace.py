"""The page: well-formed, alone in the world, everything escaped, and every token, refusal and round in it."""

import re
from xml.etree import ElementTree

import pytest

from qpass.frontends.trace import Shown, page, shown, summary, write_trace
from qpass.runtime.control import Round, Switch
from qpass.runtime.stats import Piece

ROUNDS = [
    Round(0, (0,), (0,), 0.0, 36.0),
    Round(4, (4,), (2,), 44.0, 38.0),
    Round(2, (2,), (2,), 22.0, 37.0),
]
ROW = [
    Shown("def"),
    Shown(" f", "draft"),
    Shown("(", "n-gram"),
    Shown("x", rejected=" y)\n"),
    Shown("):\n", "draft"),
]


def tree(text: str) -> ElementTree.Element:
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def test_every_token_is_there_with_who_proposed_it(tmp_path):
    write_trace(tmp_path / "out.html", [ROW], ROUNDS, title="a & b", prompts=["# prompt\n"])
    root = tree((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert root.find(".//title").text == "a & b"
    (row,) = root.findall(".//pre")
    spans = row.findall("span")
    assert [span.text for span in spans] == ["# prompt\n", *(piece.text for piece in ROW)]
    assert [span.get("title") for span in spans[1:]] == ["target", "draft", "n-gram", "target", "draft"]
    kinds = [span.get("class") for span in spans[1:]]
    assert kinds == ["own", "d0", "d1", "own", "d0"]
    (refused,) = row.findall("del")
    assert refused.text == " y)↵"
    assert list(row).index(refused) + 1 == list(row).index(spans[4])  # in front of what replaced it
    legend = [item.findtext("span") or item.findtext("del") for item in root.findall(".//ul/li")]
    assert legend == [
        "the target's own token",
        "proposed by the draft, accepted",
        "proposed by n-gram, accepted",
        "drafted, refused",
    ]


def test_the_charts_hold_every_round_and_switch():
    root = tree(page([ROW], ROUNDS, switches=[Switch(1, False), Switch(2, True)]))
    k, tokens = root.findall(".//svg")
    heights = [[float(g.findall("rect")[1].get("height")) for g in chart.findall("g")] for chart in (k, tokens)]
    assert heights == [[0, 1, 0.5], pytest.approx([1 / 3, 1, 1], abs=1e-4)]
    assert [g.find("title").text for g in k.findall("g")][1] == (
        "step 2: K 4, drafted 4, accepted 2; draft 44.0 ms, target 38.0 ms"
    )
    assert [(line.get("class"), line.get("x1")) for line in k.findall("line")] == [("off", "1"), ("on", "2")]


def test_the_summary_counts():
    assert summary([ROW], ROUNDS) == (
        "5 new tokens in 3 steps after the first; 2.33 tokens a step and row; 4 of 6 drafted tokens accepted (67%); "
        "1 plain steps; draft 0.07 s, target 0.11 s"
    )
    assert summary([[Shown("x")]], []) == "1 new tokens in 0 steps after the first"


def test_nothing_a_model_writes_gets_out_of_its_place():
    evil = "</pre><script>alert(1)</script>&amp;\"'\x00\x1b[31m\ud800\x9b\uffff<!--"
    text = page([[Shown(evil, evil, evil)]], ROUNDS, title=evil, prompts=[evil])
    root = tree(text)
    assert not list(root.iter("script"))
    assert root.find(".//pre/del").text == "</pre><script>alert(1)</script>&amp;\"'␀␛[31m\ufffd\ufffd\ufffd<!--"
    assert text.encode("utf-8")


def test_it_loads_nothing():
    text = page([ROW], ROUNDS, switches=[Switch(1, False)])
    assert not re.search(r"https?:|url\(|@import|\bsrc=|<link|<script|\bhref=", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_without_rounds_or_rows_it_is_still_a_page():
    assert tree(page([], [])).findall(".//svg") == []
    assert len(tree(page([ROW, []], ROUNDS)).findall(".//pre")) == 2


def test_pieces_become_text_a_character_at_a_time():
    """Tokens are bytes here: the smiley takes four, and the last of them shows it."""
    raw = "a🙂b".encode()
    pieces = [Piece(byte, drafted=i in (1, 4)) for i, byte in enumerate(raw)]
    pieces[-1] = Piece(raw[-1], False, rejected=tuple("é!".encode()))
    found = shown(pieces, lambda ids: bytes(ids).decode(errors="replace"))
    assert [piece.text for piece in found] == ["a", "", "", "", "🙂", "b"]
    assert [piece.by for piece in found] == ["target", "draft", "target", "target", "draft", "target"]
    assert found[-1].rejected == "é!"
    cut = shown(pieces[:3], lambda ids: bytes(ids).decode(errors="replace"))
    assert "".join(piece.text for piece in cut) == "a\ufffd"
