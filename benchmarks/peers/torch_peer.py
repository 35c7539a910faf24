"""PyTorch without qpass: eager, Inductor with a static cache and freezing, and torchao's CPU recipes through Inductor.

Variants: eager, inductor, torchao-int8 (weights), torchao-int4 (weights, groups of 128), torchao-w8a8 and torchao-w4a8 (dynamic).
"""

from __future__ import annotations

import os
import sys

from serve import arguments, serve

folder, variant, threads, work = arguments()
os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{work}/inductor"
os.environ["TORCHINDUCTOR_FREEZING"] = "1"

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, StaticCache  # noqa: E402

torch.set_num_threads(threads)
torch.set_grad_enabled(False)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
version = f"torch {torch.__version__}"
if variant.startswith("torchao-"):
    import torchao
    from torchao import quantization as recipes

    version += f", torchao {torchao.__version__}"
    kind = variant.removeprefix("torchao-")
    if kind == "int8":
        recipe = recipes.Int8WeightOnlyConfig()
    elif kind == "w8a8":
        recipe = recipes.Int8DynamicActivationInt8WeightConfig()
    elif kind in ("int4", "w4a8"):
        from torchao.prototype.quantization import int4  # where its recipes for CPUs are

        chosen = int4.PrototypeInt4WeightOnlyConfig if kind == "int4" else int4.Int8DynamicActivationInt4WeightConfig
        recipe = chosen(group_size=128)
    else:
        sys.exit(f"{variant}: accepted are eager, inductor, torchao-int8, torchao-w8a8, torchao-int4 and torchao-w4a8")
    recipes.quantize_(model, recipe)
step = model.forward if variant == "eager" else torch.compile(model.forward, dynamic=False)
caches: dict[int, StaticCache] = {}


def generate(prompt: list[int], new: int, on_token) -> None:
    length = -(-(len(prompt) + new) // 64) * 64
    cache = caches.setdefault(length, StaticCache(config=model.config, max_cache_len=length))
    cache.reset()
    ids, position = torch.tensor([prompt]), torch.arange(len(prompt))
    for _ in range(new):
        logits = step(
            input_ids=ids,
            cache_position=position,
            position_ids=position[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        token = int(logits[0, -1].argmax())
        on_token(token)
        ids, position = torch.tensor([[token]]), position[-1:] + 1


serve(generate, version=version)
