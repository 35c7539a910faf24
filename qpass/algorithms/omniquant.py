"""The divisor of an input, learned: OmniQuant's equivalent transformation with learned clipping (arXiv 2308.13137, section 3).

AWQ's grid has one number, how much louder inputs are favored. Here each input has its own, found by gradients (Adam,
1412.6980) through rounding as if it weren't there. The paper learns on activations, block by block; a linear's output error
is tr(E H E^T) with the second moments H of its input, so no activations are needed, and a step costs one product of some
rows with H. Ranges are learned along and thrown away: they keep the divisor from pleasing whole ones alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpass.algorithms.rtn import rtn
from qpass.scheme import Format

ROWS = 128
"""Rows of each weight that are looked at, evenly spread."""

STEPS, FEWEST = 150, 60
WIDE = 2048  # inputs beyond which there are fewer steps: each costs K^2
RATE, RANGE_RATE = 0.02, 0.05
OPEN = 4.0
"""Where a range's ends begin: the sigmoid of this is 0.98 of it."""


def learn(
    weights: Sequence[Tensor], hessian: Tensor, formats: Sequence[Format], start: Tensor, heard: Tensor
) -> Tensor:
    """The divisor, fp32 [K], of the input that the ``weights`` [N, K] share, beginning at ``start`` [K]; a pure function.

    hessian  [K, K], second moments of the input (any scale); damped, so that inputs that hardly spoke keep some weight
    heard    bool [K]: the inputs that spoke; the others' divisor stays 1

    Each weight's output error counts relative to that of rounding it to nearest, so that q doesn't drown v. The result is
    the best of all steps, ``start`` among them, with its ends balanced around 1.
    """
    k = len(start)
    best, least = start, float("inf")
    with torch.inference_mode(False), torch.enable_grad():
        tasks = [_Task(w[:: max(1, w.shape[0] // ROWS)], hessian, f) for w, f in zip(weights, formats, strict=True)]
        log = start.clone().log_().requires_grad_(True)
        ends = [{"params": [task.ends], "lr": RANGE_RATE} for task in tasks]
        optimizer = torch.optim.Adam([{"params": [log], "lr": RATE}, *ends])
        for _ in range(max(FEWEST, min(STEPS, STEPS * WIDE // k))):
            optimizer.zero_grad()
            divisor = torch.where(heard.clone(), log, 0.0).exp()
            loss = sum(task.step(divisor) for task in tasks)
            if loss < least:
                best, least = divisor.detach().clone(), loss
            optimizer.step()
    return balanced(best, heard)


def balanced(divisor: Tensor, heard: Tensor) -> Tensor:
    """The divisor with its greatest and least value balanced around 1, and 1 for inputs that never spoke."""
    if not bool(heard.any()):
        return torch.ones_like(divisor)
    spoken = divisor[heard]
    return torch.where(heard, divisor / (spoken.max() * spoken.min()).sqrt(), 1.0)


class _Task:
    """Some rows of one weight, their ranges, and what their error costs."""

    def __init__(self, weight: Tensor, hessian: Tensor, format: Format) -> None:
        self.weight, self.hessian, self.format = weight.detach().clone().float(), hessian, format
        n, k = weight.shape
        self.groups, self.group = format.groups_of(k), format.group or k
        self.ends = torch.full((n, self.groups, 2), OPEN, requires_grad=True)
        error = rtn(self.weight, format).dequantize() - self.weight
        self.rounded = float((error @ hessian).mul_(error).sum()) or 1.0

    def step(self, divisor: Tensor) -> float:
        """The relative error under a divisor [K]; adds its gradient to the divisor's and the ranges'."""
        error = self._rounded(self.weight * divisor) / divisor - self.weight
        slope = error.detach() @ self.hessian / self.rounded
        (2 * slope * error).sum().backward(retain_graph=True)
        return float((slope * error.detach()).sum())

    def _rounded(self, weight: Tensor) -> Tensor:
        """The weight [n, K] as codes give it, with gradients as if each rounding were none."""
        k, format = weight.shape[1], self.format
        w = torch.nn.functional.pad(weight, (0, self.groups * self.group - k)).view(-1, self.groups, self.group)
        low_share, high_share = torch.sigmoid(self.ends).unbind(2)
        low, high = w.amin(dim=2), w.amax(dim=2)
        if format.symmetric:
            middle = 1 << (format.bits - 1)
            scale = (torch.maximum(high, -low) * high_share / (middle - 1)).clamp(min=1e-12)
            zero = torch.full_like(scale, middle)
        else:
            if not format.float_zeros:
                low, high = low.clamp(max=0), high.clamp(min=0)
            low = low * low_share
            scale = ((high * high_share - low) / format.max_code).clamp(min=1e-12)
            zero = -low / scale
            zero = zero if format.float_zeros else _round(zero)
        scale, zero = scale[:, :, None], zero[:, :, None]
        codes = _round(w / scale + zero).clamp(0, format.max_code)
        return ((codes - zero) * scale).view(len(w), -1)[:, :k]


def _round(x: Tensor) -> Tensor:
    return x + (x.detach().round() - x.detach())
