"""A Qwen2 or Llama folder as a GGUF file in bf16, with the gguf package: weights, hyperparameters, and byte-level BPE."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy

ARCHITECTURES = {"qwen2": gguf.MODEL_ARCH.QWEN2, "llama": gguf.MODEL_ARCH.LLAMA}


def export(folder: Path, path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        raise SystemExit(f"{kind}: this export knows {', '.join(ARCHITECTURES)}")
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), kind)
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    rope = config.get("rope_parameters") or config
    writer.add_name(folder.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    if kind == "llama":
        writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _tokens(writer, folder, config, "qwen2" if kind == "qwen2" else "smollm")
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], layers)
    for name, raw, shape in _tensors(folder):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise SystemExit(f"{name} has no name in GGUF")
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            n = heads if "q_proj" in name else config["num_key_value_heads"]
            # llama.cpp rotates neighbours, transformers halves
            raw = raw.reshape(n, 2, shape[0] // n // 2, shape[1]).swapaxes(1, 2).reshape(shape)
        if len(shape) == 1:  # norms and biases stay in fp32
            writer.add_tensor(found, (raw.astype(numpy.uint32) << 16).view(numpy.float32))
        else:
            data = numpy.ascontiguousarray(raw).view(numpy.uint8)
            writer.add_tensor(found, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)


def _tensors(folder: Path):
    """Names, bf16 bits and shapes of every safetensors file, read without torch."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as source:
            size = int.from_bytes(source.read(8), "little")
            header = json.loads(source.read(size))
        data = numpy.memmap(file, numpy.uint8, "r", offset=8 + size)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name} is {entry['dtype']}; accepted: BF16")
            first, last = entry["data_offsets"]
            yield name, data[first:last].view(numpy.uint16).reshape(entry["shape"]), tuple(entry["shape"])


def _tokens(writer: gguf.GGUFWriter, folder: Path, config: dict, pre: str) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    by_id = {i: token for token, i in raw["model"]["vocab"].items()}
    added = {token["id"]: token for token in raw.get("added_tokens", [])}
    by_id |= {i: token["content"] for i, token in added.items()}
    count = config["vocab_size"]
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(count)]
    kinds = []
    for i in range(count):
        if i in added:
            kinds.append(gguf.TokenType.CONTROL if added[i]["special"] else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL if i in by_id else gguf.TokenType.UNUSED)
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config.get("bos_token_id") or 0)
    eos = config.get("eos_token_id")
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos or 0)
    writer.add_add_bos_token(False)
