"""``qpass::packed_embedding``: rows of a packed weight, as an embedding reads them. Its CPU implementation is ``kernels/cpp/binding_embedding.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.ops.linear import LIBRARY

LIBRARY.define(
    "packed_embedding(Tensor ids, Tensor packed, SymInt n, SymInt k, int format, ScalarType dtype) -> Tensor"
)


def _fake(ids: Tensor, packed: Tensor, n: int, k: int, format: int, dtype: torch.dtype) -> Tensor:
    """``ids`` int64 or int32 [...] -> [..., K], row ``id`` of the [N, K] weight that ``packed`` holds, rounded to ``dtype``.

    Raises RuntimeError for an id outside of 0..N-1.
    """
    return ids.new_empty((*ids.shape, k), dtype=dtype)


torch.library.register_fake("qpass::packed_embedding", _fake, lib=LIBRARY)
