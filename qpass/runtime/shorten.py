"""Smaller models out of a model's own weights, for drafts: its first layers, or a head of fewer tokens."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from qpass.errors import OptionError, UnsupportedError


def first_layers(model: nn.Module, count: int) -> nn.Module:
    """A model of the first ``count`` decoder layers, then the same norm and head; every Parameter is shared.

    Raises OptionError for a count outside of 1..n-1, UnsupportedError where the layers are not one list of modules.
    """
    config: Any = model.config
    depth = config.get_text_config().num_hidden_layers
    if not 1 <= count < depth:
        raise OptionError(f"layers:{count}: the target has {depth} layers; accepted: 1 to {depth - 1}")
    found = [
        (name, child)
        for name, child in model.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(found) != 1:
        raise UnsupportedError(
            f"{type(model).__name__} keeps its {depth} layers in {len(found)} lists of modules, not in one"
        )
    name, layers = found[0]
    return _with(model, name, nn.ModuleList(layers[:count]))


def smaller_vocabulary(model: nn.Module, tokens: int) -> nn.Module:
    """A model whose head gives logits of the first ``tokens`` ids only; every Parameter is shared, the head's as a view.

    Byte-pair encodings number their merges from the most frequent on, so the first ids are the ones that text is made
    of (the idea of FR-Spec, arXiv 2502.14856, without a corpus). Raises OptionError for a count beyond the head's.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise UnsupportedError(f"{type(model).__name__} has no linear output layer to make smaller")
    if not 1 <= tokens <= head.out_features:
        raise OptionError(f"a draft vocabulary of {tokens} tokens: the draft has {head.out_features}")
    if tokens == head.out_features:
        return model
    name = next(name for name, child in model.named_modules() if child is head)
    small = nn.Linear(head.in_features, tokens, bias=head.bias is not None, device="meta")
    small.weight = nn.Parameter(head.weight[:tokens], requires_grad=False)
    if head.bias is not None:
        small.bias = nn.Parameter(head.bias[:tokens], requires_grad=False)
    return _with(model, name, small.train(model.training))


def _with(model: nn.Module, name: str, replacement: nn.Module) -> nn.Module:
    """A copy of the modules from the root down to ``name``, which is another one there; the rest is shared."""
    root = top = copy.copy(model)
    *path, last = name.split(".")
    for step in path:
        top._modules = dict(top._modules)
        child = copy.copy(top._modules[step])
        assert child is not None
        top._modules[step] = child
        top = child
    top._modules = dict(top._modules)
    top._modules[last] = replacement
    return root
