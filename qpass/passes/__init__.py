"""The passes: graph in, count out; one a file, the file named like the function."""

from __future__ import annotations

from torch import fx

import qpass.ops  # noqa: F401  registers the vocabulary that the passes speak
from qpass.passes.canonicalize import canonicalize
from qpass.passes.chain_calls import chain_calls
from qpass.passes.context import Context
from qpass.passes.fold_smoothing import fold_smoothing
from qpass.passes.fuse_epilogues import fuse_epilogues
from qpass.passes.fuse_norms import fuse_norms
from qpass.passes.fuse_rope import fuse_rope
from qpass.passes.keep_int8 import keep_int8
from qpass.passes.lower import lower
from qpass.passes.merge_siblings import merge_siblings
from qpass.passes.quantize_linears import quantize_linears
from qpass.passes.runner import Pass, run
from qpass.passes.share_embeddings import share_embeddings

PIPELINE: tuple[Pass, ...] = (
    canonicalize,  # one spelling a meaning: what follows matches one form
    merge_siblings,  # q|k|v and gate|up read their input once, in one call
    fold_smoothing,  # channels that a quantizer scaled up in the weight are divided in its input
    quantize_linears,  # codes in place of weights: the only pass that changes what linears compute
    fuse_norms,  # a norm is computed as the one linear behind it reads its input
    fuse_epilogues,  # what follows a linear point by point runs before its output is rounded
    keep_int8,  # between two linears with static scales the values are rounded once, to int8
    lower,  # each site to the first lowering that takes it
    share_embeddings,  # a tied table is stored once: the embedding reads rows of the head's packed weight
    fuse_rope,  # queries, keys and values go from their linear to attention and the cache in one call
    chain_calls,  # calls of our kernels that follow each other are one: Python has no part between them
)


def run_pipeline(gm: fx.GraphModule, ctx: Context) -> tuple[fx.GraphModule, dict[str, int]]:
    """Run :data:`PIPELINE` on a copy of ``gm``; see :func:`qpass.passes.runner.run`."""
    return run(gm, ctx, PIPELINE)


__all__ = ["PIPELINE", "Context", "Pass", "run_pipeline"]
