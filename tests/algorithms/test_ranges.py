"""Ranges that are found for the error of a whole row, and divisors that are learned: on inputs that move together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpass.algorithms.awq import search
from qpass.algorithms.clip import blocks_of, clip
from qpass.algorithms.gptq import gptq
from qpass.algorithms.omniquant import balanced, learn
from qpass.algorithms.ranges import descend
from qpass.algorithms.rtn import rtn
from qpass.qweight import QWeight
from qpass.scheme import Format

N, K = 48, 200  # the last group is short


def _moments(seed: int = 0, rows: int = 2000) -> Tensor:
    """Inputs of which a few directions are loud, spread over all groups, and some channels too."""
    g = torch.Generator().manual_seed(seed)
    few = torch.randn(12, K, generator=torch.Generator().manual_seed(7))
    x = torch.randn(rows, 12, generator=g) @ few + 0.5 * torch.randn(rows, K, generator=g) + few[0]
    x = x * torch.linspace(-1, 1, K)[torch.randperm(K, generator=torch.Generator().manual_seed(3))].exp()
    return x.t() @ x / rows


def _weight(uneven: float = 0.0, seed: int = 1) -> Tensor:
    """``uneven``: by how much the columns' magnitudes differ, which no amplitude of the inputs tells."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=g) * 0.05
    return weight * (uneven * torch.randn(K, generator=torch.Generator().manual_seed(11))).exp()


def _loss(weight: Tensor, found: QWeight, hessian: Tensor, divisor: Tensor | float = 1.0) -> float:
    error = found.dequantize() / divisor - weight
    return float(((error @ hessian) * error).sum())


GROUPED = [Format(b, g, s, f) for b in (2, 3, 4) for g in (32, 64) for s, f in ((0, 0), (1, 0), (0, 1))]


@pytest.mark.parametrize("format", GROUPED, ids=str)
def test_errors_of_groups_cancel(format: Format) -> None:
    """Judged on inputs that were not looked at: better than each group by itself, and again with a second sweep."""
    weight, seen, unseen = _weight(), _moments(0), _moments(1)
    apart = _loss(weight, clip(weight, format, blocks_of(seen, format)), unseen)
    once, twice = (_loss(weight, descend(weight, format, seen, sweeps=n), unseen) for n in (1, 2))
    assert once < (0.9 if format.bits > 2 else 1.0) * apart
    assert twice < 1.01 * once
    found = descend(weight, format, seen)
    assert torch.equal(found.scales.half().float(), found.scales)
    assert int(found.codes.max()) <= format.max_code


def test_no_row_depends_on_another() -> None:
    weight, hessian, format = _weight(), _moments(), Format(4, 64)
    whole, part = descend(weight, format, hessian), descend(weight[5:9], format, hessian)
    assert torch.equal(whole.codes[5:9], part.codes)
    assert torch.equal(whole.scales[5:9], part.scales)


@pytest.mark.parametrize("format", [Format(4), Format(4, 64, integer_scales=True)], ids=str)
def test_formats_whose_ranges_hang_together_are_clipped(format: Format) -> None:
    weight, hessian = _weight(), _moments()
    found, clipped = descend(weight, format, hessian), clip(weight, format, blocks_of(hessian, format))
    assert torch.equal(found.codes, clipped.codes)


def test_inputs_that_never_spoke_are_rounded_well() -> None:
    weight, hessian, format = _weight(), _moments(), Format(4, 64)
    hessian[64:128] = hessian[:, 64:128] = 0
    errors = [(q.dequantize() - weight)[:, 64:128] for q in (descend(weight, format, hessian), rtn(weight, format))]
    assert float(errors[0].square().sum()) <= float(errors[1].square().sum())


@pytest.mark.parametrize("bad", ["weight", "hessian"])
def test_nan_is_refused(bad: str) -> None:
    weight, hessian = _weight(), _moments()
    {"weight": weight, "hessian": hessian}[bad][3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        descend(weight, Format(4, 64), hessian)


@pytest.mark.parametrize("format", [*GROUPED, Format(4), Format(3, None, True)], ids=str)
@pytest.mark.parametrize("uneven", [0.0, 1.0])
def test_a_learned_divisor_leaves_less(format: Format, uneven: float) -> None:
    weight, seen, unseen = _weight(uneven), _moments(0), _moments(1)
    amplitude = seen.diagonal().sqrt()
    loss = []
    for quantizer in (None, lambda w, h, f: descend(w, f, h)):
        divisor = search([weight], amplitude, seen, [format], quantizer)
        stretched, scaled = weight * divisor, seen / divisor[:, None] / divisor
        loss.append(_loss(weight, descend(stretched, format, scaled), unseen, divisor))
    assert loss[1] < (0.9 if uneven else 1.02) * loss[0]


def test_it_serves_gptq_too() -> None:
    weight, seen, unseen, format = _weight(1.0), _moments(0), _moments(1), Format(3, 64)
    divisor = search([weight], seen.diagonal().sqrt(), seen, [format], gptq)
    alone = _loss(weight, gptq(weight, seen, format), unseen)
    both = _loss(weight, gptq(weight * divisor, seen / divisor[:, None] / divisor, format), unseen, divisor)
    assert both < 0.9 * alone


def test_a_small_sibling_counts_as_much_as_a_large_one() -> None:
    """v's outputs are a hundredth of q's: both gain."""
    q, seen, format = _weight(1.0), _moments(), Format(3, 64)
    v = 0.01 * _weight(1.0, seed=5)
    divisor = learn([q, v], seen, [format, format], torch.ones(K), torch.ones(K, dtype=torch.bool))
    for weight in (q, v):
        plain = _loss(weight, rtn(weight, format), seen)
        assert _loss(weight, rtn(weight * divisor, format), seen, divisor) < 0.8 * plain


def test_the_start_is_kept_where_nothing_is_better() -> None:
    """Weights on the grid already: no step beats it."""
    format = Format(4, 64)
    weight = rtn(_weight(), format).dequantize()
    heard = torch.ones(K, dtype=torch.bool)
    divisor = learn([weight], torch.eye(K), [format], torch.ones(K), heard)
    assert _loss(weight, rtn(weight * divisor, format), torch.eye(K), divisor) <= 1e-3 * float(weight.square().sum())


def test_silent_inputs_stay_and_ends_are_balanced() -> None:
    heard = torch.tensor([True, True, False, True])
    divisor = balanced(torch.tensor([2.0, 8.0, 5.0, 4.0]), heard)
    assert divisor.tolist() == pytest.approx([0.5, 2.0, 1.0, 1.0])
    assert torch.equal(balanced(torch.tensor([3.0]), torch.tensor([False])), torch.ones(1))
    weight, hessian = _weight(), _moments()
    hessian[9] = hessian[:, 9] = 0
    spoke = torch.ones(K, dtype=torch.bool)
    spoke[9] = False
    learned = learn([weight], hessian + 0.01 * torch.eye(K), [Format(3, 64)], torch.ones(K), spoke)
    assert float(learned[9]) == 1.0
    assert not torch.equal(learned, torch.ones(K))


def test_learning_is_repeatable_and_leaves_no_gradients() -> None:
    weight, hessian, format = _weight(), _moments(), Format(4, 64)
    first, second = (search([weight], hessian.diagonal().sqrt(), hessian, [format], gptq) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    with torch.inference_mode():
        assert torch.equal(search([weight], hessian.diagonal().sqrt(), hessian, [format], gptq), first)
