"""One Llama block as text after each pass: what a reader of the passes wants to see, and what a change shows in review.

Regenerate with ``QPASS_UPDATE_GOLDEN=1 python -m pytest tests/passes/test_golden.py`` and read the diff.
"""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from qpass.passes import PIPELINE
from qpass.passes.runner import copy_graph_module
from qpass.passes.trace import render
from tests.support.capture import capture, context
from tests.support.tiny_models import build

FOLDER = Path(__file__).parents[1] / "golden" / "llama_block"
STAGES = ["capture", *(step.__name__ for step in PIPELINE)]


@pytest.fixture(scope="module")
def texts():
    layer = build("llama").model.layers[0]

    class Block(nn.Module):
        """The norms and linears of a Llama layer, without what lies between them: rotary and attention."""

        def __init__(self):
            super().__init__()
            self.self_attn, self.mlp = layer.self_attn, layer.mlp
            self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm

        def forward(self, x):
            y = self.input_layernorm(x)
            q, k, v = self.self_attn.q_proj(y), self.self_attn.k_proj(y), self.self_attn.v_proj(y)
            k, v = (t.view(2, 9, 2, 16).repeat_interleave(2, dim=2).view(2, 9, 64) for t in (k, v))
            x = x + self.self_attn.o_proj(torch.sigmoid(q) * k + v)
            return x + self.mlp(self.post_attention_layernorm(x))

    captured = capture(Block(), torch.randn(2, 9, 64, dtype=torch.bfloat16))
    ctx = context(captured, "w4a16-g32", materialize=False, lowering="reference")
    gm = copy_graph_module(captured.gm)
    result = {"capture": render(gm.graph)}
    for step in PIPELINE:
        step(gm.graph, ctx)
        result[step.__name__] = render(gm.graph)
    return result


@pytest.mark.parametrize("index", range(len(STAGES)), ids=STAGES)
def test_golden(texts, index):
    stage = STAGES[index]
    path = FOLDER / f"{index:02d}_{stage}.txt"
    if os.environ.get("QPASS_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[stage])
    assert path.exists(), f"{path} is missing: {__doc__}"
    assert texts[stage] == path.read_text(), f"{stage} gives another graph: {__doc__}"
