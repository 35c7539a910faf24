"""Inputs that are large in other channels for each token: "auto" rotates them, and only where that pays and can be."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qpass.algorithms.observe import Observer
from qpass.algorithms.rtn import rtn
from qpass.algorithms.smoothing import ROTATION_SAVES, smooth
from qpass.lowering.measured import Timing
from qpass.lowering.reference import Reference
from qpass.lowering.store import Scaling, WeightRef, WeightStore
from qpass.passes import (
    canonicalize,
    fold_smoothing,
    fuse_epilogues,
    fuse_norms,
    keep_int8,
    lower,
    merge_siblings,
    quantize_linears,
)
from qpass.passes.calibrated import Calibrated
from qpass.qactivation import rotated
from qpass.scheme import Format, Scheme
from tests.support.capture import Body, rewrite
from tests.support.tolerance import sqnr_db

QUANTIZED = torch.ops.qpass.quantized_linear.default
STEPS = [canonicalize, merge_siblings, fold_smoothing, quantize_linears, fuse_norms, fuse_epilogues, keep_int8]
DYNAMIC, STATIC = Scheme.parse("w8a8-dynamic"), Scheme.parse("w8a8-static")


def spiky(rows, k, seed=0):
    """In each row two channels of its own a hundred times larger: no divisor flattens them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    return x.scatter(1, torch.randint(0, k, (rows, 2), generator=generator), 100.0)


def observed(x):
    observer = Observer(x.shape[-1], x.dtype)
    observer.see(x)
    return observer


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC], ids=str)
def test_spikes_are_rotated_away(scheme):
    observer, weights = observed(spiky(500, 512)), [torch.randn(80, 512), torch.randn(40, 512)]
    auto = smooth(observer, weights, [scheme] * 2, "auto")
    best = min(
        smooth(observer, weights, [scheme] * 2, alpha).error.of(scheme is STATIC) for alpha in (None, 0.5, 0.7, 0.9)
    )
    assert auto.rotate
    assert auto.error.of(scheme is STATIC) < ROTATION_SAVES * best


@pytest.mark.parametrize(
    ("x", "schemes", "alpha"),
    [
        (torch.randn(500, 192), [DYNAMIC], "auto"),  # nothing to gain
        (spiky(500, 512), [DYNAMIC], 0.5),  # not asked to choose
        (spiky(500, 512), [DYNAMIC], None),
        (spiky(500, 520), [DYNAMIC], "auto"),  # no whole blocks of 64
        (spiky(500, 512), [DYNAMIC, Scheme.parse("w8a16")], "auto"),  # one of them multiplies 16 bits
    ],
    ids=["plain", "a number", "none", "520 inputs", "a16"],
)
def test_others_are_not(x, schemes, alpha):
    assert not smooth(observed(x), [torch.randn(40, x.shape[1]) for _ in schemes], schemes, alpha).rotate


def test_a_given_divisor_says_the_weights_are_there_already():
    observer, weight = observed(spiky(500, 512)), torch.randn(40, 512)
    assert not smooth(observer, [weight], [DYNAMIC], None, given=torch.ones(512)).rotate


def block(scheme, steps, **options):
    """A feed-forward block whose second linear was seen to read spikes."""
    torch.manual_seed(0)
    m = Body(
        lambda m, x: x + m.down(F.silu(m.gate(x)) * m.up(x)),
        gate=nn.Linear(64, 512, bias=False),
        up=nn.Linear(64, 512, bias=False),
        down=nn.Linear(512, 64),
    ).eval()
    x = torch.randn(2, 10, 64)
    seen = {64: observed(x), 512: observed(spiky(500, 512))}
    calibrated = Calibrated(lambda name: seen[512 if name == "down" else 64], lambda name: "auto")
    return rewrite(m, (x,), steps, scheme, calibrated=calibrated, **options)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-static"])
@pytest.mark.parametrize("lowering", ["generated", "onednn", "reference"])
def test_in_a_graph(scheme, lowering):
    done = block(scheme, STEPS)
    first, second = done.nodes(QUANTIZED)
    assert second.kwargs["rotate"]
    assert "rotated" in second.meta["qpass_fused"]
    assert bool(first.kwargs.get("y_rotate")) == (scheme == "w8a8-static")
    lowered = block(scheme, [*STEPS, lower], lowering=lowering, materialize=False)
    (exact,), (expected,), (result,) = done.capture.run(), done.outputs(), lowered.outputs()
    assert sqnr_db(exact, expected) > (40 if scheme == "w8a8-dynamic" else 20)  # its scale is that of the spikes
    assert sqnr_db(expected, result) > 40  # a value on a tie may fall on its other side


def test_a_rotated_weight_is_kept_apart():
    store, weight = WeightStore(algorithm=rtn), nn.Parameter(torch.randn(8, 128))
    plain, turned = (
        store.packed((WeightRef(weight, scaling=s),), Format(8, None, True), Reference())
        for s in (None, Scaling(rotate=True))
    )
    assert store.packed_count == 2
    expected = rtn(rotated(weight.detach()), Format(8, None, True))
    assert torch.equal(turned[0], expected.codes)
    assert not torch.equal(plain[0], turned[0])


@pytest.mark.parametrize("stays", [{"gate"}, {"down"}, {"gate", "down"}])
def test_a_layer_that_stays_as_it_was_writes_and_reads_the_same_codes(stays, monkeypatch):
    """Where int8 lost to bf16 on the clock on one side of the codes, or on both."""
    slow, fast = Timing(1, 2.0, 1.0), Timing(1, 1.0, 2.0)
    module = sys.modules[lower.__module__]
    monkeypatch.setattr(module, "time_site", lambda site, *_: slow if site.names[0] in stays else fast)
    expected = block("w8a8-static", STEPS)
    done = block("w8a8-static", [*STEPS, lower], materialize=False)
    assert len([record for record in done.ctx.records if record.lowering == "inductor"]) == len(stays)
    assert sqnr_db(expected.capture.run()[0], done.outputs()[0]) > 20
