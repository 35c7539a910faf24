"""Speculative decoding: the text of the model alone, in fewer of its steps, checked against plain decoding.

python examples/04_speculate.py [MODEL]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpass

path = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

spec = qpass.speculate(model, "ngram", scheme="w8a16")
inputs = tokenizer("one two three four, one two three four, one two", return_tensors="pt")
tokens = spec.generate(**inputs, max_new_tokens=48, do_sample=False)
print(tokenizer.decode(tokens[0]))
print(spec.stats)

plain = qpass.speculate(model, None, scheme="w8a16").generate(**inputs, max_new_tokens=48, do_sample=False)
assert torch.equal(tokens, plain), "speculation changed the text"
