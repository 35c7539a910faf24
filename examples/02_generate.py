"""transformers' own generate() on a compiled model, the full-precision weights released, and the account of it.

python examples/02_generate.py [MODEL]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpass

path = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)

fast = qpass.compile(model, scheme="w8a16", release_weights=True)

inputs = tokenizer("def fibonacci(n):", return_tensors="pt")
tokens = fast.generate(**inputs, max_new_tokens=24, do_sample=False, cache_implementation="static")
print(tokenizer.decode(tokens[0]))
print(qpass.explain(fast))
