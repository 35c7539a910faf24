"""Adapters of PEFT: merged, they are the model's own weights."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import qpass
from tests.support import tiny_models
from tests.support.dequantized import dequantized

IDS = torch.arange(2, 34)[None]
CONFIG = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def in_eight_bits(model: torch.nn.Module) -> torch.Tensor:
    return logits(dequantized(model, lambda name, tied: qpass.Scheme.parse("w8a16"))[0])


@pytest.fixture
def adapted() -> PeftModel:
    return get_peft_model(tiny_models.build("llama", torch.float32), CONFIG).eval()


def test_a_merged_model_is_quantized_with_its_adapter(adapted: PeftModel) -> None:
    wanted = logits(adapted)
    merged = adapted.merge_and_unload()
    found = logits(qpass.compile(merged, scheme="w8a16"))
    assert torch.allclose(found, in_eight_bits(merged), atol=1e-3, rtol=1e-3)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_merging_behind_a_compilation_packs_anew(adapted: PeftModel) -> None:
    """The base weights were packed for the adapted model's graph; merging changes them without a trace."""
    logits(qpass.compile(adapted, scheme="w8a16"))
    merged = adapted.merge_and_unload()
    found = logits(qpass.compile(merged, scheme="w8a16"))
    assert torch.allclose(found, in_eight_bits(merged), atol=1e-3, rtol=1e-3)
