"""Compile a language model with int4 weights, in ten lines.

python examples/01_compile.py [MODEL]       a folder or a hub id
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

path = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)

fast = torch.compile(model, backend="qpass", options={"scheme": "w4a16-g64"})

inputs = tokenizer("The capital of France is", return_tensors="pt")
with torch.no_grad():
    next_token = fast(**inputs).logits[0, -1].argmax()
print(tokenizer.decode(next_token))
