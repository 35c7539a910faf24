"""Quantizing while reading needs the quantized size and a tensor: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

LAYERS, HIDDEN, INNER, VOCABULARY = 12, 1024, 3072, 2048

CHILD = """
import sys, torch, qpass
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from qpass.frontends.coded import state_of
from qpass.measure.memory import peak_bytes, reset_peak, resident_bytes

torch.set_num_threads(1)
def load(path):
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=qpass.QPassConfig(scheme="w4a16-g128"))

small = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=1)).bfloat16()
small.save_pretrained(sys.argv[2])
load(sys.argv[2])  # imports and first calls
del small
before = resident_bytes()
assert reset_peak()
model = load(sys.argv[1])
peak = peak_bytes()
after = resident_bytes()
size = sum(tensor.nbytes for tensor in state_of(model)[0].values())
print(peak - before, after - before, size)
"""


def write(folder: Path) -> int:
    """A random model in two shards; returns the bytes of its largest tensor. Its layers are alike, which nobody sees."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    square, wide = torch.randn(HIDDEN, HIDDEN).bfloat16(), torch.randn(INNER, HIDDEN).bfloat16()
    tensors = {f"self_attn.{name}_proj.weight": square for name in "qkvo"} | {
        "mlp.gate_proj.weight": wide,
        "mlp.up_proj.weight": wide,
        "mlp.down_proj.weight": wide.t().contiguous(),
    }
    tensors |= {
        name: torch.ones(HIDDEN).bfloat16() for name in ("input_layernorm.weight", "post_attention_layernorm.weight")
    }
    table = torch.randn(VOCABULARY, HIDDEN).bfloat16()
    weight_map: dict[str, str] = {}
    for shard in range(2):
        rows = {
            f"model.layers.{layer}.{name}": t.clone()
            for layer in range(shard, LAYERS, 2)
            for name, t in tensors.items()
        }
        if shard:
            rows |= {
                "model.embed_tokens.weight": table,
                "lm_head.weight": table.clone(),
                "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
            }
        name = f"model-{shard + 1:05d}-of-00002.safetensors"
        save_file(rows, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(rows, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return wide.nbytes


def test_the_peak_is_the_quantized_size_and_a_tensor(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    largest = write(tmp_path / "model")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "model"), str(tmp_path / "small")], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    peak, after, size = map(int, child.stdout.split())
    assert 80e6 < size < 100e6  # a quarter of 330 MB, the embedding, and scales
    assert peak <= 1.2 * size + largest, (
        f"{peak / 1e6:.0f} MB, quantized {size / 1e6:.0f} MB, a tensor {largest / 1e6:.0f} MB"
    )
    assert after <= 1.1 * size
