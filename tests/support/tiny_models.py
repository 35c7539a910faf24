"""Every model family that the project names, built small from its transformers config, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 256
BATCH, LENGTH = 2, 9

_SHAPE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GATED = _SHAPE | {"intermediate_size": 128, "num_key_value_heads": 2}
_NO_DROPOUT_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**_GATED, tie_word_embeddings=False),
    # Hidden 80 and intermediate 200 are multiples of no group: short last groups, and N that is no multiple of a block.
    "llama_awkward": lambda: tf.LlamaConfig(
        **_GATED | {"hidden_size": 80, "intermediate_size": 200}, tie_word_embeddings=True
    ),
    "mistral": lambda: tf.MistralConfig(**_GATED),
    "qwen2": lambda: tf.Qwen2Config(**_GATED, tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3Config(**_GATED, head_dim=16),
    "gemma3": lambda: tf.Gemma3TextConfig(**_GATED, head_dim=16, sliding_window=8),
    "phi3": lambda: tf.Phi3Config(**_GATED, **_NO_DROPOUT_IDS),
    "gpt2": lambda: tf.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "gpt_bigcode": lambda: tf.GPTBigCodeConfig(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, multi_query=True
    ),
    "starcoder2": lambda: tf.Starcoder2Config(**_GATED),
    "opt": lambda: tf.OPTConfig(
        **_SHAPE, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64, **_NO_DROPOUT_IDS
    ),
    "falcon": lambda: tf.FalconConfig(**_SHAPE, multi_query=True, parallel_attn=True, bias=False, alibi=False),
    "falcon_rw": lambda: tf.FalconConfig(**_SHAPE, multi_query=False, parallel_attn=False, bias=True, alibi=True),
    "bloom": lambda: tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_SHAPE, intermediate_size=128),
    "gptj": lambda: tf.GPTJConfig(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64),
    "bert": lambda: tf.BertConfig(**_SHAPE, intermediate_size=128),
    "vit": lambda: tf.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
    ),
    "mixtral": lambda: tf.MixtralConfig(**_GATED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **_GATED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1
    ),
}

_HEADS: dict[str, type] = {
    "bert": tf.AutoModelForSequenceClassification,
    "vit": tf.AutoModelForImageClassification,
}


def build(family: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    """The family's model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    head = _HEADS.get(family, tf.AutoModelForCausalLM)
    model = head.from_config(CONFIGS[family]())
    _enliven(model)
    return model.to(dtype).eval()


def _enliven(model: nn.Module) -> None:
    """Weights under which every layer matters.

    transformers' own start (0.02 everywhere) leaves so small a model's attention uniform, whatever q and k are, and
    its biases at zero: a test could not see them wrong.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name and parameter.dim() == 2:
                parameter.normal_(std=0.3)  # not so large that the layers' outputs vanish beside it
            elif parameter.dim() >= 2:
                inputs = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[-1]
                parameter.normal_(std=1.5 * inputs**-0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


def inputs(family: str, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> dict[str, Any]:
    """Keyword arguments of one forward call over a batch of :data:`BATCH` sequences."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 32, 32, generator=generator).to(dtype)}
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    return {"input_ids": ids} if family == "bert" else {"input_ids": ids, "use_cache": False}


def logits(model: Callable[..., Any], family: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return model(**inputs(family, dtype)).logits
