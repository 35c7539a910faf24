"""Codes that somebody else found: the graph uses them as they are, merged only where their inputs are wanted alike."""

import gc

import pytest
import torch
from torch import nn

from qpass.algorithms.rtn import rtn
from qpass.lowering.given import Given, give, given_of, take_back
from qpass.lowering.released import release
from qpass.passes import canonicalize, fold_smoothing, merge_siblings, quantize_linears
from qpass.scheme import Format, Scheme
from tests.support.capture import Body, rewrite

STEPS = [canonicalize, merge_siblings, fold_smoothing, quantize_linears]
QUANTIZED = torch.ops.qpass.quantized_linear.default
INT4 = Format(4, 32)
X = torch.randn(2, 5, 64)


def body():
    return Body(lambda m, x: (m.a(x) - 1, m.b(x) - 2), a=nn.Linear(64, 48, bias=False), b=nn.Linear(64, 16, bias=False))


def give_all(module, **more):
    """Codes of other values than the Parameters': what uses them can't be what uses the Parameters."""
    weights = []
    for layer, extra in ((module.a, more.get("a", more)), (module.b, more.get("b", more))):
        weights.append(rtn(torch.randn_like(layer.weight), INT4))
        give(layer.weight, Given.of(weights[-1], source="test", **extra))
    return weights


def expected(weight, x, divisor=None, order=None):
    x = x if divisor is None else x / divisor
    x = x if order is None else x[..., order]
    return x @ weight.dequantize().t()


DIVISOR, ORDER = torch.rand(64) + 0.5, torch.randperm(64)


@pytest.mark.parametrize("more", [{}, {"divisor": DIVISOR}, {"order": ORDER}, {"divisor": DIVISOR, "order": ORDER}])
def test_given_codes_are_what_is_computed(more):
    module = body()
    a, b = give_all(module, **more)
    done = rewrite(module, (X,), STEPS, "w8a16")  # bits come from what was given, activations from the scheme
    assert done.counts["merge_siblings"] == 1
    assert done.counts["fold_smoothing"] == ("divisor" in more)
    assert [n.meta["qpass_scheme"].name for n in done.nodes(QUANTIZED)] == ["w4a16-g32"]
    for found, weight, one in zip(done.outputs(), (a, b), (1, 2), strict=True):
        torch.testing.assert_close(found, expected(weight, X, **more) - one, rtol=1e-5, atol=1e-4)


def test_inputs_wanted_otherwise_do_not_merge():
    module = body()
    a, b = give_all(module, a={"divisor": DIVISOR}, b={"order": ORDER})
    done = rewrite(module, (X,), STEPS, "w8a16")
    assert done.counts["merge_siblings"] == 0
    torch.testing.assert_close(done.outputs()[0], expected(a, X, DIVISOR) - 1, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(done.outputs()[1], expected(b, X, None, ORDER) - 2, rtol=1e-5, atol=1e-4)


def test_given_and_own_codes_do_not_merge():
    module = body()
    give(module.a.weight, Given.of(rtn(module.a.weight, INT4), divisor=DIVISOR))
    assert rewrite(module, (X,), STEPS, "w4a16-g32").counts["merge_siblings"] == 0


def test_excluded_layers_keep_their_values_where_they_have_any():
    module = body()
    give_all(module)
    done = rewrite(module, (X,), STEPS, "w16a16")
    assert done.counts["quantize_linears"] == 0
    torch.testing.assert_close(done.outputs()[0], done.capture.run()[0])
    for layer in (module.a, module.b):
        release(layer.weight, "given")
    assert rewrite(module, (X,), STEPS, "w16a16").counts["quantize_linears"] == 1


def test_new_codes_are_packed_anew_and_taken_back_ones_forgotten():
    module = body()
    give_all(module)
    captured = rewrite(module, (X,), STEPS, "w4a16-g32")
    store, ref = captured.ctx.weights, captured.nodes(QUANTIZED)[0].meta["qpass_refs"][0]

    class Plain:
        name = "plain"

        def pack(self, weight, *, glu):
            return (weight.codes,)

    first = store.packed((ref,), INT4, Plain())
    assert store.packed((ref,), INT4, Plain()) is first
    weight = rtn(torch.randn(48, 64), INT4)
    give(module.a.weight, Given.of(weight))
    assert torch.equal(store.packed((ref,), INT4, Plain())[0], weight.codes)
    take_back(module.a.weight)
    assert torch.equal(store.packed((ref,), INT4, Plain())[0], rtn(module.a.weight, INT4).codes)


def test_codes_go_with_their_parameter():
    parameter = nn.Parameter(torch.randn(4, 32))
    give(parameter, Given.of(rtn(parameter, INT4)))
    key = id(parameter)
    assert given_of(parameter) is not None
    del parameter
    gc.collect()
    from qpass.lowering import given

    assert key not in given._given


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"divisor": torch.zeros(64)}, "positive and finite"),
        ({"divisor": torch.ones(63)}, r"float32 \[64\]"),
        ({"order": torch.zeros(64, dtype=torch.int64)}, "permutation"),
        ({"order": torch.arange(65)}, r"int64 \[64\]"),
    ],
)
def test_what_does_not_fit_is_refused(more, words):
    with pytest.raises(ValueError, match=words):
        Given.of(rtn(torch.randn(4, 64), INT4), **more)


@pytest.mark.parametrize(
    "name", ["w4a16-g128", "w8a16", "w8a8-dynamic", "w4a8-g32", "w3a16-g64-sym", "w8a16-g32-asym", "w4a8"]
)
def test_a_scheme_named_from_its_parts_reads_back(name):
    scheme = Scheme.parse(name)
    assert Scheme.of(scheme.weight, scheme.activation) == scheme
    assert Scheme.of(Format(4, None), "a8-token-group").activation == "a8-token"
