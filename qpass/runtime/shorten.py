"""Smaller models out of a model's own weights, for drafts: its first layers, or a head of fewer tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

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


SEEN = 256
"""Rare tokens that a short head knows beside the frequent ones, those of the text that came last."""


class ShortHead(nn.Linear):
    """A head of the first ``tokens`` ids of another one, and of up to SEEN others, those that the text has.

    x [..., K] -> logits [..., V] of the whole vocabulary, -inf for tokens that it doesn't know. Byte-pair encodings number
    their merges from the most frequent on, so the first ids are what text is made of (the idea of FR-Spec, arXiv
    2502.14856, without a corpus); the rare ones are names, and a name comes again. Every Parameter is shared, as a view.
    """

    ids: Tensor  # int64 [SEEN]
    rows: Tensor  # of the head's weight, [SEEN, K]
    biases: Tensor  # [SEEN]

    def __init__(self, head: nn.Linear, tokens: int) -> None:
        super().__init__(head.in_features, tokens, bias=head.bias is not None, device="meta")
        self.weight = nn.Parameter(head.weight[:tokens], requires_grad=False)
        if head.bias is not None:
            self.bias = nn.Parameter(head.bias[:tokens], requires_grad=False)
        self._whole = (head.weight, head.bias)  # a tuple, so that they are no Parameters of this one
        self._seen: dict[int, int] = {}  # token -> place; in front what came last longest ago
        for name, like in (("rows", head.weight), ("biases", head.bias)):
            self.register_buffer(name, None if like is None else like[:1].detach().repeat_interleave(SEEN, 0), False)
        self.register_buffer("ids", torch.zeros(SEEN, dtype=torch.int64, device=head.weight.device), False)

    @torch.no_grad()
    def see(self, tokens: Iterable[int]) -> None:
        """Learn the rare ones of a text's tokens; those that came last longest ago make room."""
        rare = [token for token in dict.fromkeys(tokens) if token >= self.out_features][-SEEN:]
        for token in rare:
            if token in self._seen:
                self._seen[token] = self._seen.pop(token)
        new = [token for token in rare if token not in self._seen]
        for token in new:
            full = len(self._seen) == SEEN
            self._seen[token] = self._seen.pop(next(iter(self._seen))) if full else len(self._seen)
        if new:
            weight, bias = self._whole
            places = [self._seen[token] for token in new]
            self.ids[places] = torch.tensor(new)
            self.rows[places] = weight[new]
            if bias is not None:
                self.biases[places] = bias[new]

    def forward(self, x: Tensor) -> Tensor:
        frequent = super().forward(x)
        rare = (x[..., None, :].float() * self.rows.float()).sum(-1).to(x.dtype)  # of one row: a tenth of matmul's time
        if self.biases is not None:
            rare = rare + self.biases
        unknown = frequent.new_full((*frequent.shape[:-1], self._whole[0].shape[0] - self.out_features), -torch.inf)
        return torch.cat([frequent, unknown], -1).index_copy(-1, self.ids, rare)


def smaller_vocabulary(model: nn.Module, tokens: int) -> nn.Module:
    """A model with a :class:`ShortHead` of the first ``tokens`` ids. Raises OptionError for a count beyond the head's."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise UnsupportedError(f"{type(model).__name__} has no linear output layer to make smaller")
    if not 1 <= tokens <= head.out_features:
        raise OptionError(f"a draft vocabulary of {tokens} tokens: the draft has {head.out_features}")
    if tokens == head.out_features:
        return model
    name = next(name for name, child in model.named_modules() if child is head)
    return _with(model, name, ShortHead(head, tokens).train(model.training))


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
