"""CTranslate2 with int8 weights. Variants: int8 (int8 with float32 around it), int8_bfloat16, bfloat16."""

from __future__ import annotations

from pathlib import Path

import ctranslate2
from plain_folder import plain_folder
from serve import arguments, serve
from transformers import AutoTokenizer

folder, variant, threads, work = arguments()
source = plain_folder(folder, work)
converted = Path(work) / f"{Path(folder).name}-ctranslate2-{variant}"
if not (converted / "model.bin").exists():
    ctranslate2.converters.TransformersConverter(source, low_cpu_mem_usage=True).convert(
        str(converted), quantization=variant, force=True
    )
generator = ctranslate2.Generator(
    str(converted), device="cpu", compute_type=variant, intra_threads=threads, inter_threads=1
)
tokenizer = AutoTokenizer.from_pretrained(source)


def generate(prompt: list[int], new: int, on_token) -> None:
    tokens = tokenizer.convert_ids_to_tokens(prompt)
    settings = {"max_length": new, "min_length": new, "sampling_topk": 1}
    for step in generator.generate_tokens(tokens, **settings):
        on_token(step.token_id)


serve(generate, version=f"ctranslate2 {ctranslate2.__version__}, computes in {generator.compute_type}")
