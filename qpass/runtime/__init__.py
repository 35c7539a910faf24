"""Loops over compiled steps: the static KV cache, sampling, generation. Knows tensors and modules, nothing of graphs."""
