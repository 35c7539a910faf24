"""llama.cpp through llama-cpp-python, built from source by pip with GCC. Variants: its types Q4_0, Q8_0, Q4_K_M, BF16.

The wheel's own converter is not on PyPI, so gguf_export.py writes the weights and llama.cpp itself quantizes them.
"""

from __future__ import annotations

from pathlib import Path

import llama_cpp
from gguf_export import export
from serve import arguments, serve

folder, variant, threads, work = arguments()
TYPES = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}
whole = Path(work) / f"{Path(folder).name}.gguf"
if not whole.exists():
    export(Path(folder), whole)
path = whole if variant == "BF16" else whole.with_suffix(f".{variant}.gguf")
if not path.exists():
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = TYPES[variant], threads
    part = path.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(part).encode(), parameters):
        raise SystemExit(f"llama.cpp could not make {variant} of {whole}")
    part.rename(path)
model = llama_cpp.Llama(
    str(path), n_ctx=2048, n_batch=2048, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False
)


def generate(prompt: list[int], new: int, on_token) -> None:
    found = model.generate(prompt, temp=0.0, top_k=1, reset=True)
    model.reset()  # else a prefix of the last prompt would be kept
    for _ in range(new):
        on_token(next(found))


serve(generate, version=f"llama-cpp-python {llama_cpp.__version__}")
