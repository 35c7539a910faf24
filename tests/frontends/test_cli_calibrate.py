"""``qpass calibrate`` and ``qpass search``: files, and one sentence for what is wrong."""

import json

import pytest
from test_cli import _own_cache, _qpass  # noqa: F401

from qpass.frontends.recipe import Recipe
from qpass.frontends.statistics import Statistics

SMALL = ("--samples", 4, "--length", 48)


def test_calibrate_writes_statistics_that_search_takes(checkpoint, tmp_path):
    text, stats, recipe = tmp_path / "text.txt", tmp_path / "s.safetensors", tmp_path / "r.json"
    text.write_text("def f(x):\n    return x + 1\n" * 40)
    out = _qpass("calibrate", checkpoint, "-o", stats, "--text", text, *SMALL)
    assert out.exit_code == 0, out.output
    assert Statistics.load(stats).tokens == 4 * 48
    assert "192 tokens" in out.output
    out = _qpass("search", checkpoint, "-o", recipe, "--text", text, "--budget", "bytes<=40%", "--stats", stats, *SMALL)
    assert out.exit_code == 0, out.output
    assert "budget: bytes<=40%" in out.output
    assert Recipe.load(recipe).bytes <= 0.4 * sum(2 * n * k for n, k in Statistics.load(stats).linears.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".r.json.measured",
        "r.json",
        "s.safetensors",
        "text.txt",
    ]
    assert json.loads((tmp_path / ".r.json.measured").read_text())["kl"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("calibrate", "-o", "s.txt"), "accepted is a file .safetensors"),
        (("calibrate", "-o", "/no/such/s.safetensors"), "in a folder that exists"),
        (("search", "-o", "r.txt"), "accepted is a file .json"),
        (("search", "-o", "r.json", "--budget", "cheap"), "a budget is 'ppl<=1%' or 'bytes<=30%'"),
        (("search", "-o", "r.json", "--alpha", "some"), "accepted are auto, none and a number"),
        (("explain", "--scheme", "w8a8-static"), "scheme w8a8-static needs statistics"),
        (("explain", "--stats", "/no/such/file"), "does not exist; `qpass calibrate"),
        (("run", "-p", "x", "--recipe", "/no/such/file"), "does not exist"),
    ],
)
def test_what_is_wrong_is_said(checkpoint, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, *rest = arguments
    out = _qpass(command, checkpoint, *rest)
    assert out.exit_code == 2
    assert words in " ".join(out.output.split())
