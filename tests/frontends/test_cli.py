"""The command line: help at once, answers on stdout, one red sentence on stderr for what is wrong."""

import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from qpass.frontends.cli import app

COMMANDS = (
    "demo", "run", "explain", "kernels", "profile", "calibrate", "search", "eval", "quantize", "serve", "bench", "compare",
    "report", "doctor",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "qpass-cache"
    folder.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setenv("QPASS_CACHE", str(folder))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored behind the test, whatever the command sets
        monkeypatch.delenv(name)


def _qpass(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_help_names_the_commands_and_imports_no_torch():
    code = (
        "import sys, typer.testing; from qpass.frontends.cli import app;"
        "out = typer.testing.CliRunner().invoke(app, ['--help']).output; print(out); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.getcwd())
    assert done.stdout.strip().endswith("False")
    for command in COMMANDS:
        assert re.search(rf"^\W*{command}\s", done.stdout, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    out = _qpass(command, "--help")
    assert out.exit_code == 0
    assert "Usage" in out.output


def test_run_streams_text_and_reports(checkpoint):
    out = _qpass("run", checkpoint, "--prompt", "hello", "--max-new-tokens", 12, "--scheme", "w8a16")
    assert out.exit_code == 0, out.output
    assert out.stdout.strip()
    for word in ("tokens", "TTFT", "TPOT", "compile", "2 graphs", "linear weights", "peak"):
        assert word in out.stderr
    assert "TTFT" not in out.stdout


def test_run_repeats_itself_with_a_seed(checkpoint):
    arguments = (
        "run",
        checkpoint,
        "-p",
        "hi",
        "--max-new-tokens",
        16,
        "--temperature",
        1.2,
        "--top-k",
        50,
        "--no-chat",
    )
    first, again, other = (_qpass(*arguments, "--seed", seed) for seed in (7, 7, 8))
    assert first.exit_code == 0, first.output
    assert first.stdout == again.stdout
    assert first.stdout != other.stdout


def test_run_says_when_the_context_is_shorter_than_asked(checkpoint):
    out = _qpass("run", checkpoint, "-p", "x" * 100, "--max-new-tokens", 500, "--no-chat")
    assert out.exit_code == 0, out.output
    assert "context of 128 leaves room for 28 new tokens" in out.stderr


def test_run_falls_back_visibly_where_the_static_cache_does_not_serve(tmp_path):
    import tiny_checkpoint
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    tiny_checkpoint.write(tmp_path)
    config = BloomConfig(
        vocab_size=258, hidden_size=32, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=0, pad_token_id=1
    )
    BloomForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    out = _qpass("run", tmp_path, "-p", "hi", "--max-new-tokens", 3)
    assert out.exit_code == 0, out.output
    assert "ALiBi" in out.stderr
    assert "generate() on the compiled model instead" in out.stderr


def test_explain_prints_the_table(checkpoint):
    out = _qpass("explain", checkpoint, "--scheme", "w4a16-g32", "--exclude", "lm_head")
    assert out.exit_code == 0, out.output
    for word in ("down_proj", "w4a16-g32", "all linears", "graph 0"):
        assert word in out.stdout


@pytest.mark.parametrize("arguments", [("run", "-p", "hi", "--max-new-tokens", 2), ("explain",)], ids=lambda a: a[0])
def test_attention_that_is_not_native_is_told(checkpoint, monkeypatch, arguments):
    from qpass.errors import KernelError
    from qpass.kernels import attention_unit

    def refuse(*args, **kwargs):
        raise KernelError("the attention kernel needs AVX2; this CPU is a Pentium")

    command, *options = arguments
    assert "attention" not in _qpass(command, checkpoint, *options).stderr
    monkeypatch.setattr(attention_unit, "ensure", refuse)
    out = _qpass(command, checkpoint, *options)
    assert out.exit_code == 0, out.output
    assert "attention runs as plain torch, slowly: the attention kernel needs AVX2; this CPU is a Pentium" in out.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "/does/not/exist", "-p", "x"), "does not exist; accepted: a folder"),
        (("explain", "/does/not/exist"), "does not exist; accepted: a folder"),
        (("run", "{model}", "-p", "x", "--scheme", "w5a3"), "unknown scheme 'w5a3'; accepted: w16a16"),
        (("explain", "{model}", "--scheme", "w5a3"), "unknown scheme 'w5a3'; accepted: w16a16"),
        (("run", "{model}", "-p", "x", "--exclude", "no.such.module"), "no.such.module"),
        (("run", "{model}", "-p", "x", "--lowering", "magic"), "magic"),
        (("run", "{model}", "-p", "x", "--lowering", "onednn", "--scheme", "w4a16-g32"), "onednn: serves int8 weights"),
        (("run", "{model}", "-p", "x", "--top-p", "3"), "top_p is 3.0"),
        (("run", "{model}", "-p", ""), "the prompt is empty"),
        (("run", "{model}", "-p", "x" * 200, "--no-chat"), "prompt has 200 tokens; the model's context is 128"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_two(checkpoint, arguments, message):
    out = _qpass(*(str(checkpoint) if a == "{model}" else a for a in arguments))
    assert out.exit_code == 2, out.output
    assert message in " ".join(out.stderr.split())
    assert out.stderr.startswith("error: ")
    assert len(out.stderr.strip().splitlines()) == 1
    assert "Traceback" not in out.output


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CXX", "/no/such/compiler", "the C++ compiler CXX='/no/such/compiler' was not found"),
        ("QPASS_ISA", "mmx", "accepted are"),
    ],
)
def test_a_machine_that_cannot_is_told_before_anything_is_loaded(checkpoint, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    out = _qpass("run", checkpoint, "-p", "x")
    assert out.exit_code == 2
    assert message in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1


def test_debug_shows_the_traceback():
    from qpass.errors import QpassError

    out = _qpass("run", "/does/not/exist", "-p", "x", "--debug")
    assert isinstance(out.exception, QpassError)


@pytest.mark.parametrize(
    "arguments", [("run", "x"), ("run", "-p", "x"), ("run", "m", "-p", "x", "--nonsense"), ("fly",)]
)
def test_wrong_usage_is_exit_code_two(arguments):
    assert _qpass(*arguments).exit_code == 2


def test_no_chat_template_is_told(tmp_path):
    import tiny_checkpoint

    tiny_checkpoint.write(tmp_path, chat=False)
    out = _qpass("run", tmp_path, "-p", "x", "--chat")
    assert out.exit_code == 2
    assert "no chat template; use --no-chat" in out.stderr
