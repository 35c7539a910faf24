"""The peers' interface: one clock and one protocol; what an engine prints, refuses or dies of becomes no number."""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))
import install
import run
from plain_folder import plain_folder

from qpass.measure.record import Record

PEERS = Path(run.__file__).parent
ENGINE = f"""
import sys, time
sys.path.insert(0, {str(PEERS)!r})
from serve import arguments, serve
folder, variant, threads, work = arguments()
if variant == "broken":
    sys.exit("no such instruction: tilezero")
print("words of the engine itself")
asked = []
def generate(prompt, new, on_token):
    asked.append(prompt)
    if variant == "dies" and len(asked) == 3:
        sys.exit("Illegal instruction")
    if variant == "silent":
        time.sleep(60)
    if variant == "refuses":
        raise ValueError("the prompt is too long")
    time.sleep(0.05)
    for i in range(new - (variant == "short")):
        on_token(prompt[0] + i)
        time.sleep(0.02)
serve(generate, version="engine 1")
"""
IDS = torch.tensor([[40, 2]])


@pytest.fixture
def start(tmp_path: Path):
    """Processes of the engine above, ended behind the test."""
    (tmp_path / "engine.py").write_text(ENGINE)
    started: list[run.Process] = []

    def begin(variant: str) -> run.Process:
        command = [sys.executable, str(tmp_path / "engine.py"), "folder", variant, "1", str(tmp_path)]
        started.append(run.Process(f"Engine {variant}", command, tmp_path))
        return started[-1]

    yield begin
    for process in started:
        process.end()


def is_stopped(process: run.Process) -> bool:
    """Within a second: a signal takes effect when its process runs next."""
    for _ in range(100):
        if Path(f"/proc/{process.child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.01)
    return False


def test_a_turn(start) -> None:
    process = start("good")
    assert process.about == {"version": "engine 1"}
    assert is_stopped(process)
    outcome = process.generate(IDS, 4)
    assert process.tokens == [40, 41, 42, 43]
    assert 50 <= outcome.ttft_ms < 1000
    assert 20 <= outcome.tpot_ms < 500  # from the first token to the last, over three
    assert is_stopped(process)
    assert "words of the engine itself" in process.log.read_text()


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("broken", "no such instruction: tilezero"),
        ("refuses", "ValueError: the prompt is too long"),
        ("short", "gave 3 tokens instead of 4"),
    ],
)
def test_a_reason_why_not(start, variant: str, reason: str) -> None:
    with pytest.raises(run.Refused, match=reason):
        start(variant).generate(IDS, 4)


def test_who_does_not_answer_is_ended(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ANSWER_S", 0.5)
    process = start("silent")
    with pytest.raises(run.Refused, match="no answer within"):
        process.generate(IDS, 4)
    assert process.child.wait(5) < 0  # a late answer can't be taken for the next one


def test_who_dies_in_its_turns_is_a_row_and_the_others_go_on(start, tmp_path: Path, monkeypatch) -> None:
    processes = {name: start(name) for name in ("good", "dies", "short")}

    def filled(args: object, shortest: object, running: dict) -> dict[str, str]:
        running.update({process.name: process for process in processes.values()})
        return {}

    def turns(
        contenders: list, ids: torch.Tensor, new: int, rounds: int, settings: dict, pids: list
    ) -> Iterator[Record]:
        """The clock's part, without the rates of the machine."""
        times = {each.name: [each.generate(ids, new).ttft_ms for _ in range(rounds)] for each in contenders}
        for name, seen in times.items():
            yield Record.of("ttft", seen, "ms", {**settings, "variant": name})

    monkeypatch.setattr(run, "start", filled)
    monkeypatch.setattr(run, "measure_case", turns)
    args = argparse.Namespace(model="m", threads=1, new=4, rounds=3, ours=[])
    records = list(run.measure(args, {2: IDS}, {}))
    told = {(r.what, r.settings["variant"]): r.settings.get("reason") for r in records}
    assert told == {
        ("absent", "Engine short"): "gave 3 tokens instead of 4",
        ("absent", "Engine dies"): "Illegal instruction",
        ("ttft", "Engine good"): None,
    }


def test_what_is_not_installed_says_so(tmp_path: Path) -> None:
    assert "not installed; run python peers/install.py llama" in str(install.why_not(tmp_path, "llama"))
    (tmp_path / "llama.failed").write_text("pip could not install it: no compiler\n")
    assert install.why_not(tmp_path, "llama") == "pip could not install it: no compiler"
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "installed").touch()
    assert install.why_not(tmp_path, "llama") is None
    assert all((PEERS / peer.script).is_file() for peer in install.PEERS.values())


def test_older_transformers_find_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(
        json.dumps({"dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e6}})
    )
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    (tmp_path / "m" / "model.safetensors").write_bytes(b"weights")
    for _ in range(2):  # the second run finds the first one's copy
        copy = Path(plain_folder(str(tmp_path / "m"), str(tmp_path / "work")))
    config = json.loads((copy / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (1e6, "bfloat16")
    assert json.loads((copy / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (copy / "model.safetensors").read_bytes() == b"weights"


def test_gguf_export(tmp_path: Path) -> None:
    """The file's tensors are the folder's; of a Llama, queries and keys are turned to llama.cpp's pairs."""
    gguf = pytest.importorskip("gguf")
    import numpy
    from gguf_export import export
    from safetensors.torch import save_file

    torch.manual_seed(0)
    width, heads = 8, 2
    names = {f"model.layers.0.self_attn.{x}_proj.weight": torch.randn(width, width) for x in "qkvo"}
    names |= {f"model.layers.0.mlp.{x}_proj.weight": torch.randn(width, width) for x in ("gate", "up", "down")}
    names |= {"model.embed_tokens.weight": torch.randn(4, width), "model.norm.weight": torch.randn(width)}
    names |= {f"model.layers.0.{x}_layernorm.weight": torch.randn(width) for x in ("input", "post_attention")}
    weights = {name: tensor.bfloat16() for name, tensor in names.items()}
    save_file(weights, tmp_path / "model.safetensors")
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width,
        "num_attention_heads": heads,
        "vocab_size": 4,
    }
    config |= {
        "num_key_value_heads": heads,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 123.0}}))
    model = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    export(tmp_path, tmp_path / "m.gguf")
    read = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {t.name: t for t in read.tensors}
    assert len(found) == len(weights)

    def bits(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy.array(found[name].data).view(numpy.int16)).view(torch.bfloat16)

    assert torch.equal(bits("blk.0.attn_v.weight"), weights["model.layers.0.self_attn.v_proj.weight"])
    query = weights["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(
        bits("blk.0.attn_q.weight"), query[[0, 2, 1, 3, 4, 6, 5, 7]]
    )  # halves to neighbours, a head each
    norm = torch.from_numpy(numpy.array(found["output_norm.weight"].data))
    assert torch.equal(norm, weights["model.norm.weight"].float())
    (theta,) = struct.unpack("f", bytes(read.fields["llama.rope.freq_base"].parts[-1]))
    assert theta == 123.0
