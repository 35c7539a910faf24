"""``qpass kernels`` and ``qpass profile``: every site and every part with its numbers, and what is wrong in one sentence."""

import json
import re

import pytest
from test_cli import _own_cache, _qpass  # noqa: F401

from qpass.cpu import detect
from qpass.kernels.plan import SERVED

needs_kernels = pytest.mark.skipif(detect().tier not in SERVED, reason="needs a tier that the kernels serve")


@needs_kernels
def test_kernels_lists_every_distinct_linear(checkpoint):
    out = _qpass("kernels", checkpoint, "--scheme", "w4a16-g32", "--tokens", 1, "--tokens", 20)
    assert out.exit_code == 0, out.output
    flat = re.sub(r"\s+", " ", re.sub(r"[│┃]", " ", out.stdout))
    for words in ("gate_proj", "down_proj", "lm_head", "w4a16-g32", "w8a16"):
        assert words in flat
    rows = re.findall(
        r"(linear|stream|panel|tiles) x(\d+)\s+(memory|arithmetic)\s+([\d.]+)\s+([\d.]+)\s+[+-]\d+%\s+\d+%", flat
    )
    assert len(rows) == 2 * 5  # qkv, o, gate and up, down, head: each at two M
    assert all(float(model) > 0 and float(measured) > 0 for *_, model, measured in rows)
    assert "GB/s" in out.stdout


@needs_kernels
def test_profile_adds_up_and_draws(checkpoint, tmp_path):
    picture = tmp_path / "step.svg"
    out = _qpass("profile", checkpoint, "--scheme", "w8a16", "--context", 20, "-o", picture)
    assert out.exit_code == 0, out.output
    parts = dict(re.findall(r"│ (\w[\w ]*?)\s+│\s+([\d.]+) │", out.stdout))
    assert {"linear", "attention", "pointwise", "rest"} <= set(parts)
    step = float(re.search(r"context of 20,\s+([\d.]+)\s+ms", out.stdout).group(1))
    total = sum(float(ms) for name, ms in parts.items() if not name.startswith("K ="))
    assert abs(total - step) < 0.1 + 0.01 * len(parts)  # as printed, rounded
    assert picture.read_text().startswith("<?xml")


@needs_kernels
@pytest.mark.parametrize(
    ("step", "title"),
    [("verify:3", "3 drafted tokens checked at a context of 20"), ("prompt", "a prompt of 20")],
)
def test_profile_of_other_steps(checkpoint, tmp_path, step, title):
    record = tmp_path / "step.jsonl"
    out = _qpass("profile", checkpoint, "--scheme", "w8a16", "--context", 20, "--step", step, "-o", record)
    assert out.exit_code == 0, out.output
    assert title in re.sub(r"\s+", " ", out.stdout)
    settings = json.loads(record.read_text())["settings"]
    calls = {part["name"]: part["calls"] for part in settings["parts"]}
    assert settings["step"] == step
    assert calls["attention"] == 2  # layers
    assert calls["linear"] == 4 * 2 + 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("kernels", "--tokens", 0), "--tokens 0"),
        (("kernels", "--scheme", "w5a16"), "w5a16"),
        (("kernels", "--exclude", "no.such.*"), "'no.such.*' matches none of the linear layers: lm_head"),
        (("profile", "--exclude", "no.such.*"), "'no.such.*' matches none of the linear layers: lm_head"),
        (("profile", "--context", 10**7), "context"),
        (("profile", "-o", "step.txt"), ".png, .svg and .pdf"),
        (("profile", "--step", "verify:99"), "verify:1 to verify:15"),
        (("profile", "--step", "everything"), "accepted are token, prompt"),
    ],
)
def test_wrong_options_are_told(checkpoint, arguments, words):
    command, *options = arguments
    out = _qpass(command, checkpoint, *options)
    assert out.exit_code == 2
    assert words in out.stderr
    assert "Traceback" not in out.output


def test_a_model_that_is_not_there():
    for command in ("kernels", "profile"):
        out = _qpass(command, "/no/such/folder")
        assert out.exit_code == 2
        assert "does not exist" in out.stderr


BROKEN_CONFIGS = {
    "no JSON": "{",
    "not an object": "[1, 2]",
    "no architecture": "{}",
    "an unknown one": '{"model_type": "no_such_model"}',
    "not a language model": '{"model_type": "vit"}',
    "senseless sizes": '{"model_type": "llama", "hidden_size": "wide"}',
    "sizes that don't fit": '{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 0}',
}


@needs_kernels
@pytest.mark.parametrize("name", BROKEN_CONFIGS)
def test_a_broken_config_is_one_sentence(tmp_path, name):
    (tmp_path / "config.json").write_text(BROKEN_CONFIGS[name])
    out = _qpass("kernels", tmp_path)
    assert out.exit_code == 2, out.output
    assert f"error: {tmp_path} " in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1
    assert "Traceback" not in out.output


def test_an_int8_cache_answers_too(checkpoint):
    out = _qpass("run", checkpoint, "--prompt", "hello", "--max-new-tokens", 4, "--kv", "int8")
    assert out.exit_code == 0, out.output
    assert out.stdout.strip()
    wrong = _qpass("run", checkpoint, "--prompt", "hello", "--kv", "int3")
    assert wrong.exit_code == 2
    assert "int3" in wrong.stderr
    assert "int8" in wrong.stderr
