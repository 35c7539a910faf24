"""``qpass quantize``: an artefact with its tokenizer, by every algorithm; what can't be is told before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import qpass
from qpass.algorithms.rtn import rtn
from qpass.frontends import hf
from qpass.frontends.cli import app
from qpass.lowering.given import given_of

GATE = "model.layers.1.mlp.gate_proj.weight"


def run(*words: object) -> str:
    result = CliRunner().invoke(app, ["quantize", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


def test_round_to_nearest(checkpoint: Path, tmp_path: Path) -> None:
    said = run(checkpoint, tmp_path / "out", "--scheme", "w4a16-g32", "--exclude", "lm_head")
    assert "w4a16-g32 by rtn" in said
    loaded = hf.load(tmp_path / "out")
    assert loaded.tokenizer.decode(loaded.tokenizer("hello").input_ids) == "hello"
    given = given_of(loaded.model.get_parameter(GATE))
    assert (given.format.bits, given.format.group, given.source) == (4, 32, "rtn")
    assert given_of(loaded.model.lm_head.weight) is None
    assert torch.equal(loaded.model.lm_head.weight, hf.load(checkpoint).model.lm_head.weight)


def test_gptq_on_a_text(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    run(checkpoint, tmp_path / "out", "--scheme", "w4a16-g32", "--algorithm", "gptq", "--calibration", text)
    model = qpass.load(tmp_path / "out")
    given = given_of(model.get_parameter(GATE))
    assert "gptq" in given.source.lower()
    calibration = model.config.quantization_config.calibration
    assert calibration["algorithm"] == "gptq"
    assert len(calibration["fingerprint"]) == 64
    plain = hf.load(checkpoint)
    rounded = rtn(plain.model.get_parameter(GATE).detach(), given.format)
    assert not torch.equal(given.read().codes, rounded.codes)
    ids = plain.tokenizer(text.read_text()[:100], return_tensors="pt").input_ids
    with torch.no_grad():
        out, expected = model(ids).logits.float(), plain.model(ids).logits.float()
    assert float((out - expected).norm() / expected.norm()) < 0.6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--algorithm", "magic"], "unknown algorithm 'magic'; accepted: rtn, gptq, awq, awq+gptq, clip"),
        (["--calibration", __file__], "rtn reads no data"),
        (["--algorithm", "gptq", "--calibration", "/does/not/exist"], "/does/not/exist does not exist"),
        (["--scheme", "w5a16"], "unknown scheme 'w5a16'"),
    ],
)
def test_wrong_wishes(checkpoint: Path, tmp_path: Path, words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["quantize", str(checkpoint), str(tmp_path / "out"), *words])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()
