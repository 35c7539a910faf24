"""Intel's extension for PyTorch 2.8, archived: a historical mark. Variants: bf16, int8 and int4 (weights only)."""

from __future__ import annotations

import intel_extension_for_pytorch as ipex
import torch
from plain_folder import plain_folder
from serve import arguments, serve
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

folder, variant, threads, work = arguments()
torch.set_num_threads(threads)
torch.set_grad_enabled(False)
model = AutoModelForCausalLM.from_pretrained(plain_folder(folder, work), torch_dtype=torch.bfloat16).eval()
recipe = None
if variant != "bf16":
    kind = ipex.quantization.WoqWeightDtype.INT8 if variant == "int8" else ipex.quantization.WoqWeightDtype.INT4
    group = -1 if variant == "int8" else 128
    recipe = ipex.quantization.get_weight_only_quant_qconfig_mapping(
        weight_dtype=kind,
        lowp_mode=ipex.quantization.WoqLowpMode.INT8 if variant == "int4" else ipex.quantization.WoqLowpMode.BF16,
        group_size=group,
    )
model = ipex.llm.optimize(model, dtype=torch.bfloat16, quantization_config=recipe, inplace=True, deployment_mode=True)


class Stream(BaseStreamer):
    def __init__(self, on_token) -> None:
        self.on_token, self.prompt = on_token, True

    def put(self, value) -> None:
        if self.prompt:  # transformers hands over the prompt first
            self.prompt = False
            return
        for token in value.flatten().tolist():
            self.on_token(token)

    def end(self) -> None:
        pass


def generate(prompt: list[int], new: int, on_token) -> None:
    ids = torch.tensor([prompt])
    with torch.amp.autocast("cpu", dtype=torch.bfloat16):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            num_beams=1,
            streamer=Stream(on_token),
        )


serve(generate, version=f"ipex {ipex.__version__}, torch {torch.__version__}")
