"""keep_int8: int8 from one static linear to the next, and twins whose output somebody else reads as well."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qpass.algorithms.observe import Observer
from qpass.errors import QpassError
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
from tests.support.capture import Body, rewrite
from tests.support.tolerance import sqnr_db

QUANTIZED = torch.ops.qpass.quantized_linear.default
BEFORE = [canonicalize, merge_siblings, fold_smoothing, quantize_linears, fuse_norms, fuse_epilogues]
X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))


def calibrated():
    def observer(name):
        k = 96 if name == "down" or name == "other" else 64
        seen = Observer(k, torch.float32)
        seen.see(torch.randn(500, k, generator=torch.Generator().manual_seed(1)))
        return seen

    kept = {}
    return Calibrated(lambda name: kept.setdefault(name, observer(name)), lambda name: None)


def rewritten(body, steps, scheme="w8a8-static", **options):
    torch.manual_seed(0)
    parts = {"up": nn.Linear(64, 96), "gate": nn.Linear(64, 96), "down": nn.Linear(96, 64), "other": nn.Linear(96, 64)}
    module = Body(body, **parts, norm=nn.RMSNorm(96, eps=1e-6)).eval()
    return rewrite(module, (X,), steps, scheme, calibrated=calibrated(), **options)


KEPT = {
    "gated": lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
    "activation": lambda m, x: m.down(F.gelu(m.up(x))),
    "residual": lambda m, x: m.down(m.up(x) + x.repeat(1, 1, 2)[..., :96]),
    "two readers merged": lambda m, x: (lambda y: (m.down(y), m.other(y)))(F.relu(m.up(x))),
    "two readers apart": lambda m, x: (lambda y: (m.down(y), F.silu(m.other(y))))(F.relu(m.up(x))),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name):
    plain, done = rewritten(KEPT[name], BEFORE), rewritten(KEPT[name], [*BEFORE, keep_int8])
    assert done.counts["keep_int8"] == 1
    first = done.nodes(QUANTIZED)[0]
    (scale,) = {reader.kwargs["x_scale"] for reader in first.users}
    assert first.kwargs["y_scale"] == scale
    assert first.meta["example_value"].dtype == torch.int8
    assert all(reader.kwargs["dtype"] == torch.float32 for reader in first.users)
    assert first.meta["qpass_fused"][-1] == "int8"
    for a, b in zip(plain.outputs(), done.outputs(), strict=True):  # in fp32 nothing is rounded in between
        assert a.dtype == b.dtype
        assert sqnr_db(a, b) > 100


@pytest.mark.parametrize("lowering", ["generated", "onednn", "reference"])
def test_every_lowering_speaks_int8(lowering):
    expected = rewritten(KEPT["gated"], BEFORE).outputs()
    done = rewritten(KEPT["gated"], [*BEFORE, keep_int8, lower], lowering=lowering, materialize=False)
    for a, b in zip(expected, done.outputs(), strict=True):
        assert sqnr_db(a, b) > 60


LEFT = {
    "read by the graph's caller": lambda m, x: (lambda y: (m.down(y), y))(m.up(x)),
    "read by another op": lambda m, x: (lambda y: m.down(y) + y.sum())(m.up(x)),
    "normalized in between": lambda m, x: m.down(m.norm(m.up(x))),
    "also a residual": lambda m, x: (lambda y: m.down(y).repeat(1, 1, 2)[..., :96] + y)(m.up(x)),
    "reshaped in between": lambda m, x: m.down(m.up(x).reshape(10, 96)),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name):
    assert rewritten(LEFT[name], [*BEFORE, keep_int8]).counts["keep_int8"] == 0


def test_a_scale_a_token_is_found_on_the_values():
    assert rewritten(KEPT["gated"], [*BEFORE, keep_int8], "w8a8-dynamic").counts["keep_int8"] == 0


def test_a_pair_that_could_be_folded_is_a_complaint():
    def forget(graph, ctx):
        return 0

    forget.__name__ = "keep_int8"
    with pytest.raises(QpassError, match="is rounded to the model's dtype, and then to int8"):
        rewritten(KEPT["gated"], [*BEFORE, forget])
