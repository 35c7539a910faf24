"""fold_smoothing: the division goes where it is exact, the numbers stay, and calibration says how much."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qpass.algorithms.observe import Observer
from qpass.algorithms.rtn import rtn
from qpass.algorithms.smoothing import Error, Smoothed, divisor
from qpass.errors import OptionError, SchemeError
from qpass.lowering.given import Given, give
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
from qpass.passes.calibrated import Calibrated, Decision, most_static
from qpass.passes.fold_smoothing import COLUMNS, ROWS, divide
from qpass.scheme import Format, Scheme
from tests.support.capture import Body, rewrite
from tests.support.tolerance import assert_rounding_apart, sqnr_db

LINEAR, NORM = torch.ops.qpass.linear.default, torch.ops.qpass.norm.default
QUANTIZED = torch.ops.qpass.quantized_linear.default
BEFORE = [canonicalize, merge_siblings]
STEPS = [*BEFORE, fold_smoothing, quantize_linears, fuse_norms, fuse_epilogues]
X = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))


class OneMore(nn.RMSNorm):
    """Gemma's: the weight counts from one."""

    def forward(self, x):
        y = x.float()
        return ((1.0 + self.weight.float()) * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))).type_as(x)


def observed(k, outliers=(3, 17)):
    observer = Observer(k, torch.float32)
    x = torch.randn(500, k, generator=torch.Generator().manual_seed(1))
    x[:, list(outliers)] *= 30
    observer.see(x)
    return observer


def calibrated(alpha=0.5, sizes=(64, 96, 128)):
    """Every input, by the linears' number of inputs; a linear is named for it: ``fc64``."""
    observers = {k: observed(k) for k in sizes}
    return Calibrated(lambda name: observers.get(int(name[-2:]) if name[-2:].isdigit() else 0), lambda name: alpha)


def module(body, **extra):
    torch.manual_seed(0)
    parts = {
        "rms": nn.RMSNorm(64, eps=1e-6),
        "layer": nn.LayerNorm(64),
        "gemma": OneMore(64),
        "plain": nn.LayerNorm(64, elementwise_affine=False),
        "q_64": nn.Linear(64, 64),
        "v_64": nn.Linear(64, 32, bias=False),
        "gate_64": nn.Linear(64, 96),
        "up_64": nn.Linear(64, 96),
        "down_96": nn.Linear(96, 64),
        "both_64": nn.Linear(64, 192),
        "square_64": nn.Linear(64, 64),
    } | extra
    result = Body(body, **parts)
    with torch.no_grad():
        for name in ("rms", "layer", "gemma"):
            for parameter in result.get_submodule(name).parameters():
                parameter.copy_(torch.rand(64) + 0.5)
    return result.eval()


def unquantized(graph, ctx):
    """What the linears compute after the fold, their weights scaled as asked and nothing rounded to codes."""
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        columns, rows = node.meta.get(COLUMNS), node.meta.get(ROWS)
        sizes = [ctx.weight_ref(w).shape[0] for w in node.args[1]]

        def scaled(x, weights, biases, columns=columns, rows=rows, sizes=sizes):
            parts = torch.ones(sum(sizes)).split(sizes) if rows is None else rows.split(sizes)
            columns = 1 if columns is None else columns
            return torch.cat(
                [
                    F.linear(x, (w * columns * r[:, None]), None if b is None else b * r)
                    for w, b, r in zip(weights, biases, parts, strict=True)
                ],
                -1,
            )

        node.target = scaled
    return 0


CASES = {
    # body, inputs divided, norms left over (folded or not), divisions left in the graph, linears with scaled rows
    "rms": (lambda m, x: m.q_64(m.rms(x)), 1, 1, 0, 0),
    "layer norm with a bias": (lambda m, x: m.q_64(m.layer(x)), 1, 1, 0, 0),
    "gemma": (lambda m, x: m.q_64(m.gemma(x)), 1, 1, 0, 0),
    "a norm without weights": (lambda m, x: m.q_64(m.plain(x)), 1, 1, 0, 0),
    "merged siblings": (lambda m, x: (lambda y: (m.q_64(y), m.v_64(y)))(m.rms(x)), 1, 1, 0, 0),
    "siblings apart": (lambda m, x: (lambda y: (m.q_64(y), F.silu(m.up_64(y))))(m.rms(x)), 1, 1, 0, 0),
    "another reader": (lambda m, x: (lambda y: (m.q_64(y), y * 2))(m.rms(x)), 1, 2, 0, 0),
    "gate and up": (
        lambda m, x: (lambda y: m.down_96(F.silu(m.gate_64(y)) * m.up_64(y)))(m.rms(x)),
        2,
        1,
        0,
        1,
    ),
    "one linear for both": (
        lambda m, x: (lambda y: m.down_96(F.gelu(y[0]) * y[1]))(m.both_64(m.rms(x)).chunk(2, -1)),
        2,
        1,
        0,
        1,
    ),
    "relu": (lambda m, x: m.down_96(F.relu(m.up_64(x))), 2, 0, 1, 1),
    "gelu is no product": (lambda m, x: m.down_96(F.gelu(m.up_64(x))), 2, 0, 2, 0),
    "one behind the other": (lambda m, x: m.square_64(m.q_64(x)), 2, 0, 1, 1),
    "the product has another reader": (
        lambda m, x: (lambda y: (m.down_96(y), y))(F.silu(m.gate_64(x)) * m.up_64(x)),
        2,
        0,
        2,
        0,
    ),
    "up has another reader": (
        lambda m, x: (lambda u: (m.down_96(F.silu(m.gate_64(x)) * u), u))(m.up_64(x)),
        2,
        0,
        2,
        0,
    ),
    "plain x": (lambda m, x: m.q_64(x) + x, 1, 0, 1, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_division_is_folded_where_it_is_exact(name):
    body, count, norms, divisions, scaled = CASES[name]
    m = module(body)
    done = rewrite(m, (X,), [*BEFORE, fold_smoothing, unquantized], "w8a8-dynamic", calibrated=calibrated())
    assert done.counts["fold_smoothing"] == count
    assert len(done.nodes(NORM)) == norms
    assert len(done.nodes(divide)) == divisions
    assert sum(ROWS in node.meta for node in done.gm.graph.nodes) == scaled
    assert_rounding_apart(done.capture.run(), done.outputs())


def test_smoothing_takes_the_outliers_out_of_int8():
    m = module(lambda m, x: m.q_64(x))
    x = X.clone()
    x[..., 3] *= 30
    x[..., 17] *= 30
    exact = rewrite(m, (x,), [canonicalize]).outputs()[0]
    plain = rewrite(m, (x,), STEPS, "w8a8-dynamic").outputs()[0]
    smooth = rewrite(m, (x,), STEPS, "w8a8-dynamic", calibrated=calibrated()).outputs()[0]
    auto = rewrite(m, (x,), STEPS, "w8a8-dynamic", calibrated=calibrated("auto")).outputs()[0]
    assert sqnr_db(exact, smooth) > sqnr_db(exact, plain) + 6
    assert sqnr_db(exact, auto) > sqnr_db(exact, smooth) - 1.5


def test_one_divisor_for_all_that_share_an_input():
    m = module(lambda m, x: (lambda y: (m.q_64(y), F.silu(m.up_64(y))))(m.rms(x)))
    done = rewrite(m, (X,), [*BEFORE, fold_smoothing], "w8a8-dynamic", calibrated=calibrated())
    first, second = (node.meta[COLUMNS] for node in done.nodes(LINEAR))
    expected = divisor(observed(64).absmax, [m.q_64.weight.detach(), m.up_64.weight.detach()], 0.5)
    assert torch.equal(first, second)
    assert torch.allclose(first, expected)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32", "w16a16"])
def test_activations_that_stay_are_not_smoothed(scheme):
    m = module(lambda m, x: m.q_64(m.rms(x)))
    assert rewrite(m, (X,), STEPS, scheme, calibrated=calibrated()).counts["fold_smoothing"] == 0


def test_a_tied_head_keeps_its_table():
    table = nn.Embedding(40, 64)
    m = Body(lambda m, ids: F.linear(m.rms(m.table_64(ids)), m.table_64.weight), table_64=table, rms=nn.RMSNorm(64))
    done = rewrite(m, (torch.arange(10)[None],), STEPS, "w8a8-dynamic", calibrated=calibrated())
    assert done.counts["fold_smoothing"] == 0


def test_w4a8_is_smoothed_too():
    m = module(lambda m, x: m.q_64(m.rms(x)))
    done = rewrite(m, (X,), STEPS, "w4a8-g32", calibrated=calibrated())
    (site,) = done.nodes(QUANTIZED)
    assert site.meta["qpass_fused"] == ("rms_norm", "smoothed", "bias")
    assert sqnr_db(done.capture.run()[0], done.outputs()[0]) > 15


def test_static_scales_come_from_calibration():
    m = module(lambda m, x: m.q_64(x))
    done = rewrite(m, (X,), STEPS, "w8a8-static", calibrated=calibrated("auto"))
    (site,) = done.nodes(QUANTIZED)
    assert site.args[7] == "a8-static"
    assert 0 < site.kwargs["x_scale"] < 1
    assert sqnr_db(done.capture.run()[0], done.outputs()[0]) > 20


def one_sided(k):
    """What a ReLU gives, seen by calibration, with one channel larger than the rest."""
    observer = Observer(k, torch.float32)
    x = F.relu(torch.randn(500, k, generator=torch.Generator().manual_seed(1)))
    x[:, 3] *= 8
    observer.see(x)
    return observer


@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_codes_of_one_sided_inputs_lie_about_their_middle(alpha, bias):
    """Half the step, and the bias makes good what was taken off: a ReLU's output, smoothed or not."""
    m = module(lambda m, x: m.free_96(F.relu(x)), free_96=nn.Linear(96, 64, bias=bias))
    x = torch.randn(2, 40, 96, generator=torch.Generator().manual_seed(3))
    x[..., 3] *= 8
    observer = one_sided(96)
    seen = Calibrated(lambda name: observer, lambda name: alpha)
    done = rewrite(m, (x,), STEPS, "w8a8-static", calibrated=seen)
    (site,) = done.nodes(QUANTIZED)
    assert "shifted" in site.meta["qpass_fused"]
    assert site.kwargs["x_shift"] == pytest.approx(127 * site.kwargs["x_scale"], rel=1e-4)  # from zero on
    shift = seen.decided.popitem()[1].smoothed
    symmetric = Calibrated(lambda name: observer, lambda name: alpha)
    key = (("free_96",), (Scheme.parse("w8a8-static"),), True, True)
    symmetric.decided[key] = Decision(replace(shift, scale=2 * shift.scale, shift=0.0), (Scheme.parse("w8a8-static"),))
    plain = rewrite(m, (x,), STEPS, "w8a8-static", calibrated=symmetric)
    assert "x_shift" not in plain.nodes(QUANTIZED)[0].kwargs
    exact = rewrite(m, (x,), [canonicalize]).outputs()[0]
    assert sqnr_db(exact, done.outputs()[0]) > sqnr_db(exact, plain.outputs()[0]) + 3


def test_a_shift_goes_with_scaled_rows_and_into_int8_between():
    """The linear in front takes the next one's divisor into its rows and its zero point into its codes."""
    m = module(lambda m, x: m.down_96(F.relu(m.up_64(m.rms(x)))))
    first, second = Observer(64, torch.float32), Observer(96, torch.float32)
    x = X.clone()
    x[..., 3] *= 8
    with torch.no_grad():
        y = m.rms(x)
        first.see(y)
        second.see(F.relu(m.up_64(y)))
    seen = Calibrated(lambda name: first if name[-2:] == "64" else second, lambda name: 0.5)
    exact = rewrite(m, (x,), [canonicalize]).outputs()[0]
    plain = rewrite(m, (x,), STEPS, "w8a8-static", calibrated=seen)
    up, down = plain.nodes(QUANTIZED)
    assert up.meta["qpass_refs"][0].scaling.rows is not None
    assert down.kwargs["x_shift"] > 0
    assert sqnr_db(exact, plain.outputs()[0]) > 30
    done = rewrite(m, (x,), [*STEPS, keep_int8], "w8a8-static", calibrated=seen)
    assert done.nodes(QUANTIZED)[0].kwargs["y_shift"] == down.kwargs["x_shift"]
    assert sqnr_db(plain.outputs()[0], done.outputs()[0]) > 100
    for lowering in ("generated", "onednn", "reference"):
        lowered = rewrite(m, (x,), [*STEPS, keep_int8, lower], "w8a8-static", calibrated=seen, lowering=lowering)
        assert sqnr_db(plain.outputs()[0], lowered.outputs()[0]) > 60


def test_codes_of_inputs_about_zero_lie_about_zero():
    m = module(lambda m, x: m.q_64(x))
    done = rewrite(m, (X,), STEPS, "w8a8-static", calibrated=calibrated("auto"))
    assert "x_shift" not in done.nodes(QUANTIZED)[0].kwargs


@pytest.mark.parametrize(
    ("gains", "given_up"),
    [
        ([0.003] * 20, 2),  # a tenth
        ([0.003] * 9, 0),  # of nine linears a tenth is none
        ([0.5] * 5 + [0.003] * 15, 5),  # the unbearable ones, however many
        ([0.003] * 19 + [0.01], 2),
        ([0.0] * 20, 0),
    ],
)
def test_beyond_a_tenth_only_the_unbearable_give_up_their_static_scale(gains: list[float], given_up: int) -> None:
    static, dynamic = Scheme.parse("w8a8-static"), Scheme.parse("w8a8-dynamic")
    smoothed = Smoothed(None, None, None, Error(0.0, 0.0))
    kept = Decision(smoothed, (static,))
    decisions = [Decision(smoothed, (dynamic,), ("why",), kept, gain) if gain else kept for gain in gains]
    found = most_static([None, *decisions])
    assert found[0] is None
    names = [decision.schemes[0].name for decision in found[1:]]
    assert names.count("w8a8-dynamic") == given_up
    worst = sorted(range(len(gains)), key=lambda i: -gains[i])[:given_up]
    assert all(names[i] == "w8a8-dynamic" for i in worst)


def test_who_cannot_bear_a_static_scale_gets_one_a_token():
    """One token in five hundred a thousand times the rest, in every channel: no one scale serves both."""
    observer = Observer(64, torch.float32)
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(1))
    x[7] *= 1000
    observer.see(x)
    m = module(lambda m, x: m.q_64(x))
    done = rewrite(m, (X,), STEPS, "w8a8-static", calibrated=Calibrated(lambda name: observer, lambda name: "auto"))
    (site,) = done.nodes(QUANTIZED)
    assert (site.args[7], site.meta["qpass_scheme"].name) == ("a8-token", "w8a8-dynamic")
    assert "one static scale would cost" in site.meta["qpass_notes"][0]


def test_static_without_statistics_is_refused():
    m = module(lambda m, x: m.q_64(x))
    with pytest.raises(SchemeError, match="q_64: scheme w8a8-static needs statistics"):
        rewrite(m, (X,), STEPS, "w8a8-static")
    with pytest.raises(OptionError, match="q_64: calibration saw no such linear"):
        rewrite(m, (X,), STEPS, "w8a8-static", calibrated=Calibrated(lambda name: None, lambda name: None))


def test_statistics_of_another_width_are_refused():
    m = module(lambda m, x: m.q_64(x))
    with pytest.raises(OptionError, match="another model: q_64 has 64 inputs, they know 96"):
        rewrite(m, (X,), STEPS, "w8a8-dynamic", calibrated=Calibrated(lambda name: observed(96), lambda name: 0.5))


@pytest.mark.parametrize("norm", ["rms", "none"])
def test_outliers_are_kept_apart(norm):
    """Int8 never sees them, their product is added: near what 16 bits give, whatever their size."""

    def body(m, x):
        y = m.rms(x) if norm == "rms" else x
        return m.q_64(y), m.v_64(y), F.silu(m.up_64(y))

    m, x = module(body), X.clone()
    with torch.no_grad():
        m.rms.weight[[3, 17]] *= 1000
    if norm == "none":
        x[..., [3, 17]] *= 1000
    exact = rewrite(m, (x,), [canonicalize]).outputs()
    plain = rewrite(m, (x,), STEPS, "w8a8-dynamic").outputs()
    done = rewrite(m, (x,), STEPS, "w8a8-outlier", calibrated=calibrated())
    sites = done.nodes(QUANTIZED)
    assert [site.args[7] for site in sites] == ["a8-token"] * 2
    assert all("outliers" in site.meta["qpass_fused"] for site in sites)
    for a, b, c in zip(exact, plain, done.outputs(), strict=True):
        assert sqnr_db(a, c) > 80
        assert sqnr_db(a, b) < 60


def test_no_outliers_is_plain_int8():
    m = module(lambda m, x: m.q_64(x))
    none = Calibrated(lambda name: observed(64, ()), lambda name: None)
    done = rewrite(m, (X,), STEPS, "w8a8-outlier", calibrated=none)
    assert done.counts["fold_smoothing"] == 0
    assert torch.equal(done.outputs()[0], rewrite(m, (X,), STEPS, "w8a8-dynamic").outputs()[0])


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a8-g32-intscale"])
def test_a_given_divisor_is_folded_like_one_of_ours(scheme):
    """AWQ: into the rows of a preceding linear through its scales, where that has given codes too."""
    m = module(lambda m, x: (lambda y: m.down_96(F.silu(m.gate_64(y)) * m.up_64(y)))(m.rms(x)))
    format = Scheme.parse(scheme).weight
    for name, k in (("gate_64", 64), ("up_64", 64), ("down_96", 96)):
        s = torch.rand(k, generator=torch.Generator().manual_seed(k)) + 0.5
        weight = m.get_submodule(name).weight
        give(weight, Given.of(rtn(weight.detach() * s, format), divisor=s))
    done = rewrite(m, (X,), STEPS, scheme)
    assert done.counts["fold_smoothing"] == 2
    assert not done.nodes(divide)
    assert sqnr_db(done.capture.run()[0], done.outputs()[0]) > 14
    scales = next(node.meta["qpass_refs"] for node in done.nodes(QUANTIZED))[1].scaling.rows
    assert scales.shape == (96,)


def test_packed_weights_are_kept_apart_by_their_smoothing():
    from qpass.lowering.reference import Reference
    from qpass.lowering.store import Scaling, WeightRef, WeightStore

    store, weight = WeightStore(algorithm=rtn), nn.Parameter(torch.randn(8, 64))
    refs = [WeightRef(weight, scaling=s) for s in (None, Scaling(torch.rand(64) + 1), Scaling(rows=torch.rand(8) + 1))]
    packed = [store.packed((ref,), Format(8, None, True), Reference()) for ref in refs]
    assert store.packed_count == 3
    again = WeightRef(weight, scaling=Scaling(refs[1].scaling.columns.clone()))
    assert store.packed((again,), Format(8, None, True), Reference()) is packed[1]
    assert Scheme.parse("w8a8-static").needs_statistics
