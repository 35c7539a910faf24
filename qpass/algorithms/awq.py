"""AWQ: inputs that are loud get finer weights, by scaling them down and their columns up (arXiv 2306.00978).

y = W x = (W diag(s)) (x / s), and rounding W diag(s) instead of W makes column j's error about s_j times smaller. The paper
searches s = amplitude^alpha, alpha from 0 to 1, for the least output error (equations 4 and 5), with the amplitude being
the mean magnitude of the input. The output error needs no inputs, only their second moments: |E X|^2 = tr(E H E^T).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpass.algorithms.clip import blocks_of, clip
from qpass.algorithms.rtn import rtn
from qpass.qweight import QWeight
from qpass.scheme import Format

STEPS = 20
"""Values of alpha that are tried (the paper's grid)."""

ROWS = 256
"""Rows of each weight that the search looks at, evenly spread: they share one alpha, and more rows don't move it."""


def awq(
    weights: Sequence[Tensor],
    amplitude: Tensor,
    hessian: Tensor,
    formats: Sequence[Format],
    *,
    steps: int = STEPS,
    clipped: bool = True,
) -> tuple[list[QWeight], Tensor]:
    """Quantize the ``weights`` [N, K] of linears that share one input; a pure function.

    amplitude  [K], the input's mean magnitude; ``hessian`` [K, K], its second moments (any scale)
    clipped    shrink each group's range to where its own output error is least (section 3.2)

    Returns the codes of W diag(divisor) and the divisor, fp32 [K]: they multiply x / divisor. Raises ValueError for NaN,
    infinity and shapes that don't fit.
    """
    divisor = search(weights, amplitude, hessian, formats, steps=steps)
    scaled = hessian / divisor[:, None] / divisor
    found = []
    for weight, format in zip(weights, formats, strict=True):
        stretched = weight.detach().float() * divisor
        found.append(clip(stretched, format, blocks_of(scaled, format)) if clipped else rtn(stretched, format))
    return found, divisor


def search(
    weights: Sequence[Tensor],
    amplitude: Tensor,
    hessian: Tensor,
    formats: Sequence[Format],
    *,
    steps: int = STEPS,
) -> Tensor:
    """The divisor, fp32 [K], that leaves the least output error over all ``weights``; arguments as for :func:`awq`."""
    k = amplitude.shape[0]
    _check(weights, amplitude, hessian, k)
    rows = [w[:: max(1, w.shape[0] // ROWS)].detach().float() for w in weights]
    shares = [w.shape[0] / r.shape[0] for w, r in zip(weights, rows, strict=True)]
    best, least = torch.ones(k), float("inf")
    for step in range(steps):
        divisor = _divisor(amplitude, step / steps)
        loss = 0.0
        for weight, format, share in zip(rows, formats, shares, strict=True):
            error = rtn(weight * divisor, format).dequantize().div_(divisor).sub_(weight)
            loss += share * float((error @ hessian).mul_(error).sum())
        if loss < least:
            best, least = divisor, loss
    return best


def _divisor(amplitude: Tensor, alpha: float) -> Tensor:
    """amplitude^alpha with its ends balanced around 1, as the paper's code does; 1 for an input that never spoke."""
    spoke = amplitude > 0
    if alpha == 0 or not bool(spoke.any()):
        return torch.ones_like(amplitude, dtype=torch.float32)
    divisor = amplitude.float().clamp(min=1e-4 * float(amplitude.max())).pow(alpha)
    heard = divisor[spoke]
    divisor = divisor / (heard.max() * heard.min()).sqrt()
    return torch.where(spoke, divisor, torch.ones_like(divisor))


def _check(weights: Sequence[Tensor], amplitude: Tensor, hessian: Tensor, k: int) -> None:
    if not weights:
        raise ValueError("awq needs at least one weight")
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != k:
            raise ValueError(f"the amplitude is over {k} inputs, a weight has shape {list(weight.shape)}")
    if tuple(hessian.shape) != (k, k):
        raise ValueError(f"the Hessian must be [{k}, {k}], not {list(hessian.shape)}")
    if not bool(torch.isfinite(amplitude).all()) or bool((amplitude < 0).any()):
        raise ValueError("the amplitude holds NaN, infinity or a negative number")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian holds NaN or infinity")
