"""Intel's extension for PyTorch 2.8, archived: a historical mark. Variants: bf16, int8 and int4 (weights only), smoothquant (static int8)."""

from __future__ import annotations

import statistics
from pathlib import Path

import intel_extension_for_pytorch as ipex
import torch
from plain_folder import plain_folder
from serve import arguments, serve
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

CALIBRATION_TOKENS, WINDOW = 2048, 512
folder, variant, threads, work = arguments()
torch.set_num_threads(threads)
torch.set_grad_enabled(False)
source = plain_folder(folder, work)


def load(dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(source, torch_dtype=dtype).eval()


def weight_only():
    return ipex.quantization.get_weight_only_quant_qconfig_mapping(
        weight_dtype=ipex.quantization.WoqWeightDtype.INT8 if variant == "int8" else ipex.quantization.WoqWeightDtype.INT4,
        lowp_mode=ipex.quantization.WoqLowpMode.INT8 if variant == "int4" else ipex.quantization.WoqLowpMode.BF16,
        group_size=-1 if variant == "int8" else 128,
    )  # fmt: skip


def summary(recipe) -> str:
    """The file that calibration leaves: Python's own source, in windows; kept beside the model's copy."""
    file = Path(work) / f"{Path(folder).name}-ipex-smoothquant.json"
    if file.exists():
        return str(file)
    model = load(torch.float32)
    sample = ipex.transformers.optimize.get_dummy_input(model, return_dict=True)
    model = ipex.llm.optimize(
        model, dtype=torch.bfloat16, quantization_config=recipe, inplace=True, deployment_mode=False
    )
    prepared = ipex.quantization.prepare(model.eval(), recipe, example_kwarg_inputs=sample, inplace=True)
    text = "".join(Path(statistics.__file__).with_name(f"{name}.py").read_text() for name in ("statistics", "argparse"))
    ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt").input_ids[0, :CALIBRATION_TOKENS]
    for window in ids.split(WINDOW):
        inputs = {"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]}
        if "position_ids" in sample:
            inputs["position_ids"] = torch.arange(len(window))[None]
        prepared(**(sample | inputs))
    prepared.save_qconf_summary(qconf_summary=str(file))
    return str(file)


if variant == "smoothquant":
    recipe = ipex.quantization.get_smooth_quant_qconfig_mapping(alpha=0.5)
    chosen = {"quantization_config": recipe, "qconfig_summary_file": summary(recipe)}
else:
    chosen = {"quantization_config": None if variant == "bf16" else weight_only()}
model = load(torch.float32 if variant == "smoothquant" else torch.bfloat16)
model = ipex.llm.optimize(model, dtype=torch.bfloat16, inplace=True, deployment_mode=True, **chosen)


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
