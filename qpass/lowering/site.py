"""Site: one (possibly merged) linear layer of a graph, as the lowerings see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qpass.scheme import Scheme

ANY = 1 << 30
"""Rows: as many as one likes."""


@dataclass(frozen=True)
class Site:
    """``names`` are the modules that the site merges (one when nothing was merged); ``n`` counts all their rows."""

    names: tuple[str, ...]
    n: int
    k: int
    scheme: Scheme
    dtype: torch.dtype
    glu: bool = False

    @property
    def name(self) -> str:
        """The merged modules under one name: ``model.layers.0.self_attn.{q_proj,k_proj,v_proj}``."""
        if len(self.names) == 1:
            return self.names[0]
        parents = {name.rpartition(".")[0] for name in self.names}
        if len(parents) == 1:
            parent = parents.pop()
            leaves = ",".join(name.rpartition(".")[2] for name in self.names)
            return f"{parent}.{{{leaves}}}" if parent else f"{{{leaves}}}"
        return "+".join(self.names)
