"""Models in other programs' formats: their codes as they are, eager, compiled, and with speculation."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import qpass
from qpass.errors import CheckpointError
from qpass.frontends import backend, hf
from qpass.lowering import shelf
from qpass.lowering.given import given_of
from qpass.passes import PIPELINE
from qpass.scheme import Format
from tests.support.capture import rewrite

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))
import writers

IDS = torch.arange(2, 12)[None]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def check(model: Any, source: Path, values: dict[str, Tensor]) -> None:
    """The model computes what one with the stored values computes, but for rounding to bf16."""
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for module, value in values.items():
        given = given_of(model.get_parameter(f"{module}.weight"))
        assert given is not None, module
        weight = given.read().dequantize()
        if given.order is not None:
            weight = torch.empty_like(weight).index_copy_(1, given.order, weight)
        assert torch.equal(weight, value), module
        plain.get_submodule(module).weight = nn.Parameter(value)
    for name, parameter in plain.named_parameters():
        if name.rpartition(".")[0] not in values:
            parameter.data = parameter.data.half().bfloat16().float()
    with torch.no_grad():
        expected, out = plain(IDS).logits, model(IDS).logits.float()
    assert float((out - expected).norm() / expected.norm()) < 0.05


def of_their_own(module: str) -> Format:
    return Format(4, 64 if "v_proj" in module else 32)


@pytest.fixture(scope="module")
def gptq(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("gptq")
    return folder, writers.convert(
        checkpoint, folder, writers.gptq, GPTQ, format_of=lambda module: Format(4, 32), act_order=True
    )


def test_a_gptq_checkpoint_with_act_order(checkpoint: Path, gptq: tuple[Path, dict[str, Tensor]]) -> None:
    model = qpass.load(gptq[0])
    check(model, checkpoint, gptq[1])
    assert given_of(model.model.layers[0].mlp.up_proj.weight).order is not None


@pytest.mark.parametrize(
    ("format_of", "widths"),
    [(lambda module: Format(4, 32), [3]), (of_their_own, [1, 2])],
    ids=["one group", "a value projection with groups of its own"],
)
def test_an_awq_checkpoint_and_what_merges(checkpoint: Path, tmp_path: Path, format_of: Any, widths: list[int]) -> None:
    """q, k and v merge where their groups are alike, and all keep their codes."""
    values = writers.convert(checkpoint, tmp_path / "m", writers.awq, AWQ, format_of=format_of)
    check(qpass.load(tmp_path / "m"), checkpoint, values)
    attention = qpass.load(tmp_path / "m", dtype=torch.float32).model.layers[0].self_attn

    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)

    x = torch.randn(3, 64)
    done = rewrite(project, (x,), PIPELINE[: PIPELINE.index(_pass("quantize_linears")) + 1])
    linears = done.nodes(torch.ops.qpass.quantized_linear.default)
    assert sorted(len(node.meta["qpass_names"]) for node in linears) == widths
    for out, name in zip(done.outputs(), ("q_proj", "k_proj", "v_proj"), strict=True):
        torch.testing.assert_close(out, x @ values[f"model.layers.0.self_attn.{name}"].t(), rtol=1e-4, atol=1e-4)


def test_a_gptq_checkpoint_whose_modules_differ(checkpoint: Path, tmp_path: Path) -> None:
    config = GPTQ | {"desc_act": False, "dynamic": {r"+:.*v_proj": {"group_size": 64}, r"+:.*up_proj": {"bits": 8}}}
    values = writers.convert(
        checkpoint, tmp_path / "m", writers.gptq, config,
        format_of=lambda module: Format(8, 32) if "up_proj" in module else of_their_own(module),
    )  # fmt: skip
    check(qpass.load(tmp_path / "m"), checkpoint, values)


def _pass(name: str) -> Any:
    return next(step for step in PIPELINE if step.__name__ == name)


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewritten graphs run as they are: all that qpass does to them, and minutes less."""
    monkeypatch.setattr(backend, "compile_fx", lambda gm, inputs, **options: gm.forward)
    torch._dynamo.reset()


@pytest.mark.usefixtures("without_inductor")
def test_speculation_on_a_gptq_checkpoint_changes_no_token(gptq: tuple[Path, dict[str, Tensor]]) -> None:
    model = qpass.load(gptq[0])
    ids = IDS[:, :7]
    ask = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    plain = qpass.speculate(model, None, scheme="w8a8-dynamic").generate(ids, **ask)
    before = backend.STORE.packed_count
    spec = qpass.speculate(model, "layers:1", k=3, scheme="w8a8-dynamic")
    assert torch.equal(spec.generate(ids, **ask), plain)
    assert spec.stats.tokens_a_step > 1
    assert backend.STORE.packed_count == before  # one packed copy for both


@pytest.mark.usefixtures("without_inductor")
def test_loaded_codes_meet_the_same_passes(gptq: tuple[Path, dict[str, Tensor]]) -> None:
    model = qpass.load(gptq[0])
    fast = qpass.compile(model, scheme="w4a8-g64")
    with torch.no_grad():
        out, eager = fast(IDS).logits.float(), model(IDS).logits.float()
    assert float((out - eager).norm() / eager.norm()) < 0.15
    records = {record.name: record for record in qpass.explain(fast).records}
    gated = records["model.layers.0.mlp.gate_proj"]  # each layer has an order of its own: nothing to merge
    assert gated.scheme == "w4a8-g32"  # the checkpoint's codes, the user's activations
    assert "codes from a GPTQ checkpoint" in gated.notes
    assert records["lm_head"].scheme == "w8a16"


def write_gguf(path: Path, types: dict[str, str]) -> dict[str, Tensor]:
    """A tiny Llama as llama.cpp's converter lays it out (rows of q and k permuted); returns the values of its matrices."""
    torch.manual_seed(0)
    heads, kv, hidden, inner, vocabulary = 4, 2, 256, 512, 64
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    state = LlamaForCausalLM(config).state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (
        ("context_length", 64), ("embedding_length", hidden), ("block_count", 1), ("feed_forward_length", inner),
        ("head_count", heads), ("head_count_kv", kv), ("vocab_size", vocabulary),
    ):  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges([])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    values = {}
    for name, tensor in state.items():
        own = name.removeprefix("model.").removesuffix(".weight")
        layer, _, leaf = own.removeprefix("layers.").partition(".")
        target = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(own)
        target = target or f"blk.{layer}.{names[leaf]}"
        if "norm" in name:
            writer.add_tensor(f"{target}.weight", tensor.numpy())
            continue
        tensor = tensor * 4
        type = gguf.GGMLQuantizationType[types.get(target.rpartition(".")[2], "Q8_0")]
        stored = tensor
        if target.endswith(("attn_q", "attn_k")):
            h = heads if target.endswith("attn_q") else kv
            stored = tensor.view(h, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        raw = gguf.quants.quantize(stored.numpy(), type)
        writer.add_tensor(f"{target}.weight", raw, raw_dtype=type)
        values[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), type), type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    values = write_gguf(
        path, {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q5_1", "ffn_up": "Q4_0", "output": "Q8_0"}
    )
    model = qpass.load(path, dtype=torch.float32)
    formats = set()
    for name, value in values.items():
        given = given_of(model.get_parameter(name))
        if "embed" in name:
            assert given is None
            torch.testing.assert_close(model.get_parameter(name).detach(), value)
            continue
        torch.testing.assert_close(given.read().dequantize(), value, rtol=1e-6, atol=1e-6)
        formats.add((given.format.bits, given.format.float_zeros))
    assert formats == {(4, False), (4, True), (8, False), (8, True)}
    with torch.no_grad():
        out = model(IDS).logits
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    with torch.no_grad():
        expected = dense(IDS).logits
    assert float((out - expected).norm() / expected.norm()) < 1e-4


def test_the_commands_take_a_foreign_folder(gptq: tuple[Path, dict[str, Tensor]]) -> None:
    loaded = hf.load(gptq[0])
    assert given_of(loaded.model.model.layers[0].mlp.up_proj.weight).source == "a GPTQ checkpoint"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 5}, r"config.json: bits: is 5; accepted: 2, 3, 4, 8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, r"config.json: version: is 'gemv'; accepted: gemm"),
        (GPTQ | {"group_size": 48}, r"scales: has groups of 48; accepted: 16, 32, 64, 128"),
        (GPTQ | {"bits": 8}, r"qweight: has \d+ words for \d+ inputs, which is not 8 bits"),
    ],
)
def test_a_config_that_lies(
    gptq: tuple[Path, dict[str, Tensor]], tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        qpass.load(tampered(gptq[0], tmp_path / "m", {"quantization_config": config}))


def tampered(source: Path, target: Path, config: dict[str, Any], without: str | None = None) -> Path:
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    whole = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(whole))
    if without is not None:
        tensors = load_file(target / "model.safetensors")
        save_file({name: t for name, t in tensors.items() if not name.endswith(without)}, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("config", "without", "message"),
    [
        ({"vocab_size": 10**9}, None, r"weight: has shape \[258, 64\], where the model has \[10{9}, 64\]"),
        ({"num_hidden_layers": 3}, None, r"model.layers.2.input_layernorm.weight: is missing, with 8 others"),
        ({"num_hidden_layers": 1}, None, r"model.layers.1.mlp.down_proj: is no linear layer of LlamaForCausalLM"),
        ({"intermediate_size": 128}, None, r"down_proj.qweight: has 12 words for 128 inputs"),
        ({}, "layers.1.mlp.up_proj.qweight", r"model.layers.1.mlp.up_proj.weight: is missing"),
        ({}, "layers.1.mlp.up_proj.scales", r"model.layers.1.mlp.up_proj.scales: is missing"),
        ({}, "norm.weight", r"model.layers.0.input_layernorm.weight: is missing"),
        (
            {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}, None,
            r"config.json: auto_map: asks to run code of the checkpoint, which qpass never does",
        ),
        ({"model_type": "no such thing"}, None, r"could not be loaded"),
    ],
)  # fmt: skip
def test_a_model_that_the_files_do_not_fit(
    gptq: tuple[Path, dict[str, Tensor]], tmp_path: Path, config: dict[str, Any], without: str | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        qpass.load(tampered(gptq[0], tmp_path / "m", config, without))


def test_packed_weights_of_a_file_are_found_again(
    gptq: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(shelf, "SMALLEST", 0)

    def run(folder: Path) -> tuple[Tensor, int]:
        before = backend.STORE.packed_count
        with torch.no_grad():
            logits = qpass.load(folder)(IDS).logits
        return logits, backend.STORE.packed_count - before

    home = tmp_path / "model"
    shutil.copytree(gptq[0], home)
    first, count = run(home)
    assert count > 0
    again, count = run(home)
    assert count == 0
    assert torch.equal(first, again)
    config = json.loads((home / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"  # the same codes, other zeros
    (home / "config.json").write_text(json.dumps(config))
    changed, count = run(home)
    assert count > 0
    assert not torch.equal(first, changed)
