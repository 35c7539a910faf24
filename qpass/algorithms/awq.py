"""AWQ: inputs that are loud get finer weights, by scaling them down and their columns up (arXiv 2306.00978).

y = W x = (W diag(s)) (x / s), and rounding W diag(s) instead of W makes column j's error about s_j times smaller. The paper
searches s = amplitude^alpha, alpha from 0 to 1, for the least output error (equations 4 and 5), with the amplitude being
the mean magnitude of the input. The output error needs no inputs, only their second moments: |E X|^2 = tr(E H E^T). From the
paper's s on, each input's own is learned (omniquant.py), and ranges are searched for the whole row's error (ranges.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qpass.algorithms.omniquant import balanced, learn
from qpass.algorithms.ranges import descend
from qpass.algorithms.rtn import rtn
from qpass.qweight import QWeight
from qpass.scheme import Format

Quantizer = Callable[[Tensor, Tensor, Format], QWeight]
"""A weight [N, K] and second moments of its input [K, K] to codes."""

STEPS = 20
"""Values of alpha that are tried (the paper's grid)."""

DAMPING = 0.01
"""What is added to the Hessian's diagonal for learning, as a share of its mean, unless told otherwise."""

ROWS = 256
"""Rows of each weight that the search looks at, evenly spread: they share one alpha, and more rows don't move it."""


def awq(
    weights: Sequence[Tensor],
    amplitude: Tensor,
    hessian: Tensor,
    formats: Sequence[Format],
    *,
    damping: float = DAMPING,
    clipped: bool = True,
    learned: bool = True,
) -> tuple[list[QWeight], Tensor]:
    """Quantize the ``weights`` [N, K] of linears that share one input; a pure function.

    amplitude  [K], the input's mean magnitude; ``hessian`` [K, K], its second moments (any scale)
    clipped    shrink the groups' ranges to where the output error is least (section 3.2)
    learned    give each input a divisor of its own, where that leaves less; ``damping`` as for :func:`search`

    Returns the codes of W diag(divisor) and the divisor, fp32 [K]: they multiply x / divisor. Raises ValueError for NaN,
    infinity and shapes that don't fit.
    """
    quantizer: Quantizer = (lambda w, h, f: descend(w, f, h)) if clipped else (lambda w, h, f: rtn(w, f))
    divisor = search(weights, amplitude, hessian, formats, quantizer if learned else None, damping=damping)
    scaled = hessian / divisor[:, None] / divisor
    pairs = zip(weights, formats, strict=True)
    return [quantizer(w.detach().float() * divisor, scaled, format) for w, format in pairs], divisor


def search(
    weights: Sequence[Tensor],
    amplitude: Tensor,
    hessian: Tensor,
    formats: Sequence[Format],
    quantizer: Quantizer | None = None,
    *,
    damping: float = DAMPING,
) -> Tensor:
    """The divisor, fp32 [K], that leaves the least output error over all ``weights``; arguments as for :func:`awq`.

    quantizer  who rounds in the end. From the best of the paper's grid on a divisor for each input is learned, and the three,
               1 too, are judged by what ``quantizer`` makes of them on rows that were not learned on. None: the grid alone
    damping    of the Hessian in that, as a share of its diagonal's mean: it grows with inputs a token, as GPTQ's does
    """
    k = amplitude.shape[0]
    _check(weights, amplitude, hessian, k)
    rows = [w[:: max(1, w.shape[0] // ROWS)].detach().float() for w in weights]
    shares = [w.shape[0] / r.shape[0] for w, r in zip(weights, rows, strict=True)]
    best, least = torch.ones(k), float("inf")
    for step in range(STEPS):
        divisor = _divisor(amplitude, step / STEPS)
        loss = 0.0
        for weight, format, share in zip(rows, formats, shares, strict=True):
            error = rtn(weight * divisor, format).dequantize().div_(divisor).sub_(weight)
            loss += share * float((error @ hessian).mul_(error).sum())
        if loss < least:
            best, least = divisor, loss
    fine = [(w.detach().float(), f) for w, f in zip(weights, formats, strict=True) if f.bits < 8]
    if quantizer is None or not fine:
        return best
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(k)
    learned = learn([w for w, _ in fine], damped, [f for _, f in fine], best, amplitude > 0)
    candidates = [learned, best] if bool((best == 1).all()) else [learned, best, torch.ones(k)]
    return min(candidates, key=lambda divisor: _judged(divisor, fine, damped, quantizer))


def _judged(divisor: Tensor, weights: list[tuple[Tensor, Format]], hessian: Tensor, quantizer: Quantizer) -> float:
    """What ``quantizer`` leaves of each weight's output error over that of rounding it to nearest, in sum."""
    scaled, total = hessian / divisor[:, None] / divisor, 0.0
    for weight, format in weights:
        stride = max(1, weight.shape[0] // ROWS)
        w = weight[stride // 2 :: stride]
        error = quantizer(w * divisor, scaled, format).dequantize() / divisor - w
        plain = rtn(w, format).dequantize() - w
        most = float((plain @ hessian).mul_(plain).sum())
        total += float((error @ hessian).mul_(error).sum()) / most if most > 0 else 0.0
    return total


def _divisor(amplitude: Tensor, alpha: float) -> Tensor:
    """amplitude^alpha with its ends balanced around 1, as the paper's code does; 1 for an input that never spoke."""
    if alpha == 0:
        return torch.ones_like(amplitude, dtype=torch.float32)
    divisor = amplitude.float().clamp(min=1e-4 * float(amplitude.max())).pow(alpha)
    return balanced(divisor, amplitude > 0)


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
