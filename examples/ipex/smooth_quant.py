"""The SmoothQuant tutorial of Intel Extension for PyTorch, with other imports.

python examples/ipex/smooth_quant.py MODEL [SUMMARY]       a folder or a hub id; the file that calibration writes

https://intel.github.io/intel-extension-for-pytorch/cpu/latest/tutorials/llm/llm_optimize.html
"""

import sys

import torch
import transformers
from torch.utils.data import DataLoader

import qpass.ipex as ipex  # was: import intel_extension_for_pytorch as ipex
from qpass.ipex.quantization import prepare  # was: from intel_extension_for_pytorch.quantization import prepare

model_name_or_path = sys.argv[1]
qconfig_summary_file_path = sys.argv[2] if len(sys.argv) > 2 else "summary.safetensors"
tokenizer = transformers.AutoTokenizer.from_pretrained(model_name_or_path)
your_calibration_dataset = [
    tokenizer(text * 16, return_tensors="pt").input_ids[0, :64]
    for text in (
        "def add(a, b):\n    return a + b\n",
        "for i in range(10):\n    print(i)\n",
        "import os, sys\n",
        "x = [1, 2]\n",
    )
]

# load model
model = transformers.AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype=torch.bfloat16).eval()
qconfig = ipex.quantization.get_smooth_quant_qconfig_mapping()
# stage 1: calibration
# prepare your calibration dataset samples
calib_dataset = DataLoader(your_calibration_dataset)
example_inputs = next(iter(calib_dataset))  # get one sample input from calib_samples
calibration_model = ipex.llm.optimize(
    model.eval(),
    quantization_config=qconfig,
)
prepared_model = prepare(calibration_model.eval(), qconfig, example_inputs=example_inputs)
with torch.no_grad():
    for calib_samples in enumerate(calib_dataset):
        prepared_model(calib_samples)
prepared_model.save_qconf_summary(qconf_summary=qconfig_summary_file_path)

# stage 2: quantization
model = ipex.llm.optimize(
    model.eval(),
    quantization_config=qconfig,
    qconfig_summary_file=qconfig_summary_file_path,
)

# generation inference loop
inputs = tokenizer("def add(a, b):", return_tensors="pt")
with torch.inference_mode():
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
print(tokenizer.decode(output[0]))
