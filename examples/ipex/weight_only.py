"""The weight-only tutorial of Intel Extension for PyTorch, with another import.

python examples/ipex/weight_only.py MODEL       a folder or a hub id

https://intel.github.io/intel-extension-for-pytorch/cpu/latest/tutorials/llm/llm_optimize.html
"""

import sys

import torch
import transformers

import qpass.ipex as ipex  # was: import intel_extension_for_pytorch as ipex

model_name_or_path = sys.argv[1]
model = transformers.AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype=torch.bfloat16).eval()

qconfig = ipex.quantization.get_weight_only_quant_qconfig_mapping(
    weight_dtype=ipex.quantization.WoqWeightDtype.INT8,  # or INT4
    lowp_mode=ipex.quantization.WoqLowpMode.NONE,  # or FP16, BF16, INT8
)
checkpoint = None
model = ipex.llm.optimize(model, quantization_config=qconfig, low_precision_checkpoint=checkpoint)

# inference with model.generate()
tokenizer = transformers.AutoTokenizer.from_pretrained(model_name_or_path)
inputs = tokenizer("The capital of France is", return_tensors="pt")
with torch.inference_mode():
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
print(tokenizer.decode(output[0]))
