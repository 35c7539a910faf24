"""``qpass::linear``: the one spelling of a linear layer that canonicalize leaves and the later passes match."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpass.ops.epilogue import fake_output

LIBRARY = torch.library.Library("qpass", "FRAGMENT")
LIBRARY.define("linear(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor")


def _linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """``x [..., K]`` times each weight [N_i, K], the outputs side by side: [..., sum N_i]."""
    outputs = [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    return fake_output(x, sum(w.shape[0] for w in weights), glu=False)


LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("qpass::linear", _fake, lib=LIBRARY)
