"""GPTQ: each column's rounding error is made good by the columns that are still to be rounded (arXiv 2210.17323).

The paper walks the columns of W with T, the upper Cholesky factor of the inverse Hessian (Algorithm 1): round column j,
divide its error by T_jj, subtract error x T_j,: from the rest. Here the Hessian itself is factored, H = U D U^T with U
unit upper triangular. Then T = D^-1/2 U^-1, and the paper's step is the same as adding to column j the errors of all
columns before it, times U_:j (2307.13304, Theorem 6, "LDLQ"):

    w'_j = w_j + sum_{i<j} (w_i - q_i) U_ij      q_j = round(w'_j)      error = sum_j D_j (w'_j - q_j)^2

One Cholesky factorization of H instead of an inversion and a factorization, no inverse to lose digits in, and D_j says what
an error in column j costs when all later columns have made it good: the right weight for a search of a group's range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qpass.algorithms.clip import fit, span
from qpass.algorithms.rtn import HALF_TINY
from qpass.qweight import QWeight, zero_dtype
from qpass.scheme import Format

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean (section 3.3, step 3)."""

BLOCK = 128
"""Columns between two products with everything before them (section 3.3, step 2: lazy batch updates)."""

Grid = Literal["whole", "clipped"]


@dataclass(frozen=True)
class Factor:
    """H = U D U^T over the columns in ``order``; shared by all linears that read one input."""

    order: Tensor  # int64 [K]: the columns as they are rounded
    upper: Tensor  # fp32 [K, K], unit upper triangular, in that order
    pivots: Tensor  # fp32 [K], in that order: D
    damping: float  # the share that it took

    @property
    def pivots_by_column(self) -> Tensor:
        return torch.empty_like(self.pivots).index_copy_(0, self.order, self.pivots)

    def divide(self, rows: Tensor) -> Tensor:
        """``rows`` H^-1, for fp32 [N, K]."""
        ordered = rows[:, self.order]
        half = torch.linalg.solve_triangular(self.upper.t(), ordered, upper=False, left=False, unitriangular=True)
        whole = torch.linalg.solve_triangular(
            self.upper, half.div_(self.pivots), upper=True, left=False, unitriangular=True
        )
        return torch.empty_like(whole).index_copy_(1, self.order, whole)


def factor(hessian: Tensor, *, act_order: bool = True, damping: float = DAMPING) -> Factor:
    """Factor ``hessian`` [K, K] (X^T X of the layer's inputs, any scale).

    Inputs that never spoke (a zero diagonal) couple with nothing, so their columns are rounded to nearest: the paper's code
    zeroes them, but what is silent in a calibration need not be in use. Where the factorization fails, it is tried again with
    ten times the damping, up to the mean itself. Raises ValueError for NaN, infinity, a negative diagonal or a shape that
    is not square.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"the Hessian must be square [K, K], not {list(hessian.shape)}")
    if not 0 < damping <= 1:
        raise ValueError(f"damping must lie in (0, 1], not {damping}")
    h = hessian.detach().to(torch.float32)
    diagonal = h.diagonal()
    if not bool(torch.isfinite(h).all()) or bool((diagonal < 0).any()):
        raise ValueError("the Hessian holds NaN, infinity or a negative diagonal")
    mean = float(diagonal.mean()) or 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(h))
    backward = order.flip(0)  # the lower factor of the reversed matrix is the upper one of the matrix
    reversed_h = h[backward][:, backward]
    while True:
        damped = reversed_h.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed) and bool(torch.isfinite(lower).all()):
            break
        if damping >= 1:
            raise ValueError("the Hessian is not positive definite, even with its mean added to its diagonal")
        damping = min(1.0, damping * 10)
    root = lower.flip(0, 1)
    roots = root.diagonal().clone()
    return Factor(order, root / roots, roots.square(), damping)


def aligned(weight: Tensor, drift: Tensor, shared: Factor, share: float = 1.0) -> Tensor:
    """The fp32 weight [N, K] that makes of the inputs x what ``weight`` makes of the originals o, as nearly as it can.

    Layers before this one are quantized, so its inputs are not the original model's. Least squares of V x - W o is
    V = W (H + E[(o - x) x^T]) H^-1 = W + W ``drift`` H^-1 (GPTAQ, 2504.02692, section 3.2), where H's damping keeps V near W.
    ``share`` is how much of the way it goes.
    """
    weight = weight.detach().float()
    return weight + share * shared.divide(weight @ drift)


def gptq(
    weight: Tensor,
    hessian: Tensor | Factor,
    format: Format,
    *,
    act_order: bool = True,
    damping: float = DAMPING,
    block: int = BLOCK,
    grid: Grid = "whole",
) -> QWeight:
    """Quantize ``weight`` [N, K] for inputs whose second moments are ``hessian`` [K, K]; a pure function.

    act_order  round the columns of the largest inputs first. Groups are then those of the columns as they lie, with ranges
               found beforehand ("static groups"): the codes need no permutation when they run. Without it, a group's
               range is found when its first column comes, from weights that have taken the errors so far.
    block      columns a lazy update; the result doesn't depend on it but for fp32 rounding
    grid       a group's range: "whole", minimum to maximum, as rtn and the paper; "clipped", where the group's squared error,
               weighted by D, is least: up to 10% less error of the output, once the damping keeps D from fitting noise
    hessian    or its :class:`Factor`, made once for all weights that share an input; it knows its own order and damping

    Scales are storable as rtn's are. Raises ValueError for NaN, infinity and shapes that don't fit.
    """
    n, k = weight.shape
    shared = hessian if isinstance(hessian, Factor) else factor(hessian, act_order=act_order, damping=damping)
    if shared.order.shape[0] != k:
        raise ValueError(f"the Hessian is over {shared.order.shape[0]} inputs, the weight has {k}")
    if block < 1:
        raise ValueError(f"block must be positive, not {block}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinity")
    in_order = bool((shared.order == torch.arange(k)).all())
    moving = in_order and format.group is not None and not format.integer_scales  # which are found for all of a row
    ranges = _Ranges(weight, format, shared, grid, moving=moving)
    step = block if not ranges.moving else -(-block // ranges.group) * ranges.group

    # Transposed, so that a column lies together.
    w = weight.detach().t().float()[shared.order].contiguous()  # [K, N]
    missing = torch.zeros_like(w)  # w - q of the columns behind
    codes = torch.empty(k, n, dtype=torch.uint8)
    u = shared.upper
    for start in range(0, k, step):
        stop = min(k, start + step)
        part = w[start:stop].addmm(u[:start, start:stop].t(), missing[:start])
        inner = u[start:stop, start:stop].t().contiguous()  # row j: what column j takes of the block's errors
        for j in range(start, stop):
            here = j - start
            column = part[here].addmv(missing[start:j].t(), inner[here, :here]) if here else part[0]
            if ranges.moving and j % ranges.group == 0:
                ranges.find(j, _as_they_stand(w, missing, u, part, start, j, min(k, j + ranges.group)))
            scale, zero = ranges.of(int(shared.order[j]))
            code = (column / scale).add_(zero).round_().clamp_(0, format.max_code)
            codes[j] = code.to(torch.uint8)
            missing[j] = w[j] - (code - zero) * scale
    codes = torch.empty_like(codes).index_copy_(0, shared.order, codes)
    return QWeight(codes.t().contiguous(), ranges.scales, ranges.zeros.to(zero_dtype(format)), format)


class _Ranges:
    """Scales and zeros [N, K/G]: all at once from the weights, or (``moving``) group by group as they are reached."""

    def __init__(self, weight: Tensor, format: Format, shared: Factor, grid: Grid, *, moving: bool) -> None:
        self.format, self.moving, self.group = format, moving, format.group or weight.shape[1]
        self.clipped, self.pivots = grid == "clipped", shared.pivots_by_column
        self.scales, self.zeros = self._found(weight, self.pivots)
        # fp16 or not is one answer a tensor (rtn.storable), and groups that are found later keep to it.
        self.half = bool(torch.equal(self.scales.half().float(), self.scales))
        self._columns: tuple[Tensor, Tensor] = (self.scales.t().contiguous(), self.zeros.t().contiguous())

    def _found(self, weight: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
        return fit(weight, self.format, pivots) if self.clipped else span(weight, self.format)

    def find(self, column: int, weights: Tensor) -> None:
        """The range of the group that starts at ``column``, whose weights now are [N, G]."""
        scales, zeros = self._found(weights, self.pivots[column : column + weights.shape[1]])
        index = column // self.group
        if self.half:
            scales = scales.clamp(HALF_TINY, 65504.0).half().float()
        self.scales[:, index], self.zeros[:, index] = scales[:, 0], zeros[:, 0]
        self._columns[0][index], self._columns[1][index] = scales[:, 0], zeros[:, 0]

    def of(self, column: int) -> tuple[Tensor, Tensor]:
        index = column // self.group
        return self._columns[0][index], self._columns[1][index]


def _as_they_stand(w: Tensor, missing: Tensor, u: Tensor, part: Tensor, start: int, first: int, stop: int) -> Tensor:
    """Columns first..stop after the errors so far, as the paper's update leaves them: w + missing U_LR U_RR^-1, [N, G]."""
    added = part[first - start : stop - start] - w[first:stop] + u[start:first, first:stop].t() @ missing[start:first]
    square = u[first:stop, first:stop]
    return w[first:stop].t() + torch.linalg.solve_triangular(
        square, added.t(), upper=True, left=False, unitriangular=True
    )
