"""Decoders of many families, a few thousand random weights each, in fp32: big enough to disagree, small enough to be instant."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as tf

VOCAB = 97
CONTEXT = 160

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.35,  # the default gives logits so flat that greedy equality would prove little
}
_GATED: dict[str, Any] = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
    "initializer_range": 0.35,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MIXED = ["sliding_attention", "full_attention"]

CONFIGS: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**_GATED),
    "mistral-sliding": lambda: tf.MistralConfig(**_GATED, sliding_window=6),
    "qwen2": lambda: tf.Qwen2Config(**_GATED),
    "qwen2-sliding": lambda: tf.Qwen2Config(**_GATED, use_sliding_window=True, sliding_window=6, layer_types=_MIXED),
    "qwen3": lambda: tf.Qwen3Config(**_GATED, head_dim=8),
    "gemma2": lambda: tf.Gemma2Config(
        **_GATED, head_dim=8, sliding_window=6, layer_types=_MIXED, query_pre_attn_scalar=8
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(**_GATED, head_dim=8, sliding_window=6, layer_types=_MIXED),
    "phi3": lambda: tf.Phi3Config(**_GATED),
    "starcoder2": lambda: tf.Starcoder2Config(**_GATED),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**_COMMON, intermediate_size=48),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=CONTEXT,
        word_embed_proj_dim=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        init_std=0.35,
    ),
    "falcon-rotary": lambda: tf.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        max_position_embeddings=CONTEXT,
        initializer_range=0.35,
    ),
    "gpt2": lambda: tf.GPT2Config(**_GPT),
    "gpt-bigcode": lambda: tf.GPTBigCodeConfig(**_GPT),
    "gpt-j": lambda: tf.GPTJConfig(**_GPT, rotary_dim=8),
}


@cache
def build(name: str) -> tf.PreTrainedModel:
    """The model of this name; the same object each time, so treat it as read-only."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # a random model would otherwise stop wherever it likes
    model.generation_config.pad_token_id = 0
    return model


def prompt(length: int, seed: int = 1, batch: int = 1) -> torch.Tensor:
    """Random tokens [batch, length], none of them special."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
