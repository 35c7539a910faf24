"""OpenVINO GenAI, exported by optimum-intel with nncf's data-free weight compression. Variants: int4 (groups of 128), int8, bf16;
"int4+FOLDER" with the model of that folder, exported alike, as the draft."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import openvino
import openvino_genai
from plain_folder import plain_folder
from serve import arguments, serve

folder, variant, threads, work = arguments()
FORMATS = {
    "int4": ["--weight-format", "int4", "--group-size", "128", "--ratio", "1.0"],
    "int8": ["--weight-format", "int8"],
    "bf16": ["--weight-format", "bf16"],
}
ASSISTANT_TOKENS = 5
"""Drafted tokens a step; OpenVINO's own examples take 5."""

format, _, draft = variant.partition("+")


def export(folder: str) -> str:
    """The converted model's folder; made once."""
    exported = Path(work) / f"{Path(folder).name}-openvino-{format}"
    if not (exported / "done").exists():
        command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino"]
        command += [
            "-m",
            plain_folder(folder, work),
            "--task",
            "text-generation-with-past",
            *FORMATS[format],
            str(exported),
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (exported / "done").touch()
    return str(exported)


scheduler = openvino_genai.SchedulerConfig()
scheduler.enable_prefix_caching = False  # on by default: the second turn's prompt would be there already
options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
assisted = {"draft_model": openvino_genai.draft_model(export(draft), "CPU", **options)} if draft else {}
pipe = openvino_genai.LLMPipeline(export(folder), "CPU", scheduler_config=scheduler, **assisted, **options)


class Stream(openvino_genai.StreamerBase):
    def __init__(self, on_token) -> None:
        super().__init__()
        self.on_token = on_token

    def write(self, tokens):
        for token in tokens if isinstance(tokens, (list, tuple)) else [tokens]:
            self.on_token(token)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def generate(prompt: list[int], new: int, on_token) -> None:
    config = openvino_genai.GenerationConfig(
        max_new_tokens=new, ignore_eos=True, do_sample=False, apply_chat_template=False
    )
    if draft:
        config.num_assistant_tokens = ASSISTANT_TOKENS
    ids = numpy.array([prompt], dtype=numpy.int64)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
    pipe.generate(inputs, config, Stream(on_token))


serve(generate, version=f"openvino-genai {openvino_genai.__version__}")
