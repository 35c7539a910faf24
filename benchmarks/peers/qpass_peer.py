"""Ours through the same interface: a scheme's name, "stock" for Inductor in our loop, or "SCHEME+DRAFT"."""

from __future__ import annotations

from serve import arguments, serve

from qpass.frontends.commands import session

session.prepare()

import torch  # noqa: E402

import qpass  # noqa: E402
from qpass.frontends.hf import load  # noqa: E402
from qpass.frontends.speculation import Speculation  # noqa: E402
from qpass.runtime.decoder import Decoder  # noqa: E402
from qpass.runtime.speculate import Speculator  # noqa: E402

folder, variant, threads, _ = arguments()
torch.set_num_threads(threads)
loaded = load(folder)
scheme, _, draft = variant.partition("+")
if scheme == "stock":
    decoder = Decoder(loaded.model, session.baseline(loaded.model))
    decoder.warm_up()
    speculator = Speculator(decoder)
else:
    found = Speculation(
        loaded.model,
        draft or None,
        scheme=scheme,
        tokenizer=loaded.tokenizer,
        release_weights=True,
        k="auto" if draft else 0,
    )
    found.warm_up()
    speculator = found.speculator


def generate(prompt: list[int], new: int, on_token) -> None:
    def step(tokens: list[list[int]]) -> None:
        for token in tokens[0]:
            on_token(token)

    speculator.generate(torch.tensor([prompt]), max_new_tokens=new, eos_token_id=(), on_tokens=step)


serve(generate, version=f"qpass {qpass.__version__}, torch {torch.__version__}")
