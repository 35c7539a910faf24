"""Every foreign layout, as its own library packed it, means to us what it means to that library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from qpass.checkpoints.files import Checkpoint
from qpass.checkpoints.formats import reader_of
from qpass.checkpoints.gguf import GgufFile
from qpass.checkpoints.gguf_blocks import BLOCKS
from qpass.checkpoints.stored import StoredLinear

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"
"""Layers of [32, 128], groups of 32, that the named library packed; ``expected`` is its own dequantization."""


def weight_of(linear: StoredLinear) -> torch.Tensor:
    """The layer's matrix in the order of its inputs, fp32."""
    weight = linear.read().dequantize()
    if linear.order is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, linear.order, weight)


def config_of(name: str) -> dict[str, Any]:
    bits = int(name.partition("_w")[2][0])
    common = {"bits": bits, "group_size": 32, "sym": "sym" in name}
    if name.startswith("gptqmodel"):
        return common | {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "desc_act": "act" in name}
    if name.startswith("autoawq"):
        return common | {"quant_method": "awq", "version": "gemm", "zero_point": True}
    if name.startswith("torchao"):
        return {"quant_method": "torchao", "bits": bits, "sym": "sym" in name or "int8" in name}
    packing = "auto_round:auto_gptq" if "auto_gptq" in name else "auto_round"
    return common | {"quant_method": "auto-round", "packing_format": packing}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda path: path.stem)
def test_a_layer_that_its_library_packed(path: Path) -> None:
    config = config_of(path.stem)
    expected = load_file(path)["expected"]
    linear = reader_of(config, path).read(Checkpoint([path]), "layer", (32, 128))
    assert linear.format.bits == config["bits"]
    assert linear.format.group == (None if "int8" in path.stem else 32)
    assert linear.format.symmetric == config["sym"]
    assert (linear.order is not None) == path.stem.endswith("_act")
    assert torch.equal(weight_of(linear).half(), expected.half())


def test_v1_is_auto_gptqs_zero_less_one(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "auto_round-0.16.1_auto_gptq_w4.safetensors")
    save_file(tensors, tmp_path / "v1.safetensors")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    linear = reader_of(config, tmp_path).read(Checkpoint([tmp_path / "v1.safetensors"]), "layer", (32, 128))
    assert torch.equal(weight_of(linear).half(), tensors["expected"].half())


def test_the_golden_files_are_there() -> None:
    assert len(list(GOLDEN.glob("*.safetensors"))) == 28


CASES = {
    "w4-g32": QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True),
    "w4-g32-asym": QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=False),
    "w3-g64": QuantizationArgs(num_bits=3, group_size=64, strategy="group", symmetric=True),
    "w8-channel": QuantizationArgs(num_bits=8, strategy="channel", symmetric=True),
    "w2-g128-asym": QuantizationArgs(num_bits=2, group_size=128, strategy="group", symmetric=False),
    "w4-g256": QuantizationArgs(num_bits=4, group_size=256, strategy="group", symmetric=True),
}


def compressed(args: QuantizationArgs, kind: Any, scheme: QuantizationScheme, k: int) -> dict[str, torch.Tensor]:
    n, group = 40, args.group_size or k
    scale = torch.rand(n, k // group) * 0.1 + 0.01
    state = {"weight": torch.randn(n, k) * 0.2, "weight_scale": scale}
    low, high = -(1 << args.num_bits - 1), (1 << args.num_bits - 1) - 1
    if not args.symmetric:
        state["weight_zero_point"] = torch.randint(low, high + 1, (n, k // group), dtype=torch.int8)
    return kind.compress(state, scheme)


@pytest.mark.parametrize("case", CASES)
def test_pack_quantized(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    args, k = CASES[case], 512 if "256" in case else 256
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = compressed(args, PackedQuantizationCompressor, scheme, k)
    expected = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    save_file({f"layer.{name}": tensor.contiguous() for name, tensor in state.items()}, tmp_path / "m.safetensors")
    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "input_activations": None}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    linear = reader_of(config, tmp_path).read(Checkpoint([tmp_path / "m.safetensors"]), "layer", (40, k))
    assert linear.format.group == (None if args.group_size is None else min(args.group_size, 128))
    assert linear.activation == "a16"
    assert torch.equal(weight_of(linear), expected)


@pytest.mark.parametrize("dynamic", [True, False])
def test_int_quantized(dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    args = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
    inputs = QuantizationArgs(num_bits=8, strategy="token" if dynamic else "tensor", symmetric=True, dynamic=dynamic)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    state = compressed(args, IntQuantizationCompressor, scheme, 64)
    expected = IntQuantizationCompressor.decompress(state, scheme)["weight"]
    save_file({f"layer.{name}": tensor.contiguous() for name, tensor in state.items()}, tmp_path / "m.safetensors")
    group = {
        "targets": ["Linear"],
        "weights": args.model_dump(mode="json"),
        "input_activations": inputs.model_dump(mode="json"),
    }
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
    linear = reader_of(config, tmp_path).read(Checkpoint([tmp_path / "m.safetensors"]), "layer", (40, 64))
    assert linear.activation == "a8-token"
    assert ("instead of as calibrated" in linear.source) != dynamic
    assert torch.equal(weight_of(linear), expected)


EXACT = ("Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K")


@pytest.mark.parametrize("kind", [blocks.name for blocks in BLOCKS.values() if blocks.split is not None])
def test_gguf_blocks(kind: str, tmp_path: Path) -> None:
    type = gguf.GGMLQuantizationType[kind]
    blocks = BLOCKS[int(type)]
    random = np.random.default_rng(0)
    n, k = 6, 512
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        weights = random.standard_normal((n, k)).astype(np.float32)
        weights[0, :32] = 0.75  # a block of one value: its d is 0 where there is a minimum
        raw = gguf.quants.quantize(weights, type)
    else:  # the library dequantizes these, and quantizes none
        raw = random.integers(0, 256, (n, k // 256, blocks.size), dtype=np.uint8)
        halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
        for at in halves:
            raw[..., at : at + 2] = random.uniform(0.001, 0.1, (n, k // 256, 1)).astype(np.float16).view(np.uint8)
        raw = raw.reshape(n, -1)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = torch.from_numpy(gguf.quants.dequantize(raw, type))
    order = torch.tensor([3, 1, 2, 0, 5, 4])
    linear = GgufFile(tmp_path / "m.gguf").linear("blk.0.ffn_up.weight", order)
    assert linear is not None
    assert linear.shape == (n, k)
    if kind in EXACT:
        assert torch.equal(weight_of(linear), expected[order])
    else:
        torch.testing.assert_close(weight_of(linear), expected[order], rtol=1e-6, atol=1e-6)
