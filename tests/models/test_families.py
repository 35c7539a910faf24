"""Every family, built small: what the passes find in it, and that the compiled model is the one with dequantized codes."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from transformers import StaticCache

from qpass.frontends import reports
from qpass.passes import run_pipeline
from qpass.scheme import Scheme
from tests.models.expected import EXPECTED, LAYERS
from tests.support.capture import capture, context
from tests.support.dequantized import dequantized, zeros_off_by_one
from tests.support.tiny_models import CONFIGS, build, inputs, logits
from tests.support.tolerance import sqnr_db

# Both models multiply by the same numbers, so what differs is rounding.
FP32_BAR_DB = 100.0  # steps of 2^-24
BF16_MARGIN_DB = 2.0  # against fp32, the compiled model may be this much worse than the eager one: it rounds less often


def scheme_of(name: str, tied: bool = False) -> Scheme:
    """Four bits for all, heads too: in eight a wrong zero would hide in bf16's rounding."""
    return Scheme.parse("w4a16-g32")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def test_no_family_is_forgotten():
    assert set(EXPECTED) == set(CONFIGS)


@pytest.mark.parametrize("family", EXPECTED)
def test_passes(family):
    """The passes alone, in fp32, by the reference lowering: exact counts, and equal to fp32 rounding."""
    model = build(family, torch.float32)
    captured = capture(model, **inputs(family, torch.float32))
    ctx = context(captured, scheme_of, lowering="reference", materialize=False)
    gm, counts = run_pipeline(captured.gm, ctx)

    check_counts(family, counts, ctx.records, ctx.left)
    exact, names = dequantized(model, scheme_of)
    assert sorted(name for record in ctx.records for name in record.names) == sorted(names)
    with torch.no_grad():
        wanted = logits(exact, family, torch.float32)
    result = captured.run(gm)[-1]
    assert sqnr_db(wanted, result) > FP32_BAR_DB


def check_counts(family, counts, records, left):
    expected = EXPECTED[family]
    assert counts["merge_siblings"] == expected.merges
    assert counts["quantize_linears"] == counts["lower"] == len(records) == expected.sites
    assert sum(len(record.names) for record in records) == expected.all_linears
    assert dict(Counter(part for record in records for part in record.fused)) == expected.fused_parts
    norms = sum(count for part, count in expected.fused_parts.items() if part.endswith("norm"))
    assert counts["fuse_norms"] == norms
    sizes = Counter(len(record.names) for record in records if len(record.names) > 1)
    assert sizes == Counter({size: LAYERS * n for size, n in Counter(expected.merged).items()})
    outside = [record.name for record in records if not any(char.isdigit() for char in record.name)]
    assert sorted(outside) == sorted(expected.outside)
    assert {reason.split(" stay")[0] for reason in left.values()} <= {"3-D expert weights"}
    assert sorted({".".join(name.split(".")[3:]) for name in left}) == sorted(expected.left)
    assert len(left) == LAYERS * len(expected.left)


# A router in bf16 may pick another expert where two are nearly equal: no error, but no rounding either.
ROUTED = ("mixtral", "qwen3_moe")
FEW = ("vit",)  # four outputs in all: too few to tell bf16's rounding from luck
COMPILED = [(f, torch.float32 if f in ROUTED + FEW else torch.bfloat16) for f in EXPECTED if f != "falcon_rw"]
COMPILED += [("llama_awkward", torch.float32), ("gpt2", torch.float32)]


@pytest.mark.parametrize(("family", "dtype"), COMPILED, ids=lambda value: str(value).removeprefix("torch."))
def test_compiled(family, dtype):
    """Through the backend by its name, with fullgraph, by whatever lowering this machine prefers."""
    model = build(family, dtype)
    fast = torch.compile(model, backend="qpass", fullgraph=True, options={"scheme": scheme_of})
    with torch.no_grad():
        result = logits(fast, family, dtype)
    (report,) = reports.of(list(model.parameters()))
    check_counts(family, report.counts, report.records, report.left)
    wanted, bar = reference(model, family, dtype)
    assert (list(result.shape), result.dtype) == (list(wanted.shape), dtype)
    assert sqnr_db(wanted, result) > bar


def reference(model, family, dtype):
    """The logits of the model with dequantized codes, in fp32, and the bar for who computes the same in ``dtype``."""
    exact, _ = dequantized(copy.deepcopy(model).float(), scheme_of)
    with torch.no_grad():
        wanted = logits(exact, family, torch.float32)
        if dtype == torch.float32:
            return wanted, FP32_BAR_DB
        eager, _ = dequantized(model, scheme_of)
        return wanted, sqnr_db(wanted, logits(eager, family, dtype)) - BF16_MARGIN_DB


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bloom", "falcon"])
def test_a_decode_step_finds_the_same(family):
    """One token against a static cache, which the graph writes to: nothing that is matched is written to."""
    model = build(family)
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids = inputs(family)["input_ids"]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)  # the cache allocates its tensors at its first use
    captured = capture(model, input_ids=ids[:, :1], past_key_values=cache)
    ctx = context(captured, scheme_of, lowering="reference", materialize=False)
    _, counts = run_pipeline(captured.gm, ctx)
    check_counts(family, counts, ctx.records, ctx.left)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bloom"])
def test_any_length_finds_the_same(family):
    """With a symbolic length; and no pass may tie it to a number."""
    model, arguments = build(family), inputs(family)
    torch._dynamo.mark_dynamic(arguments["input_ids"], 1)
    captured = capture(model, **arguments)
    ctx = context(captured, scheme_of, lowering="reference", materialize=False)
    gm, counts = run_pipeline(captured.gm, ctx)
    check_counts(family, counts, ctx.records, ctx.left)
    assert any(isinstance(n.meta["example_value"].shape[1], torch.SymInt) for n in quantized_linears(gm))


def quantized_linears(gm):
    return gm.graph.find_nodes(op="call_function", target=torch.ops.qpass.quantized_linear.default)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "falcon", "bert", "vit", "mixtral"])
def test_the_bar_sees_one_wrong_site(family):
    """Zeros off by one at one site, whichever, fall below the bar even of bf16."""
    model = build(family, torch.bfloat16)
    wanted, bar = reference(model, family, torch.bfloat16)
    exact = copy.deepcopy(model).float()
    _, names = dequantized(exact, scheme_of)
    with torch.no_grad():
        for name in names:
            wrong, _ = dequantized(exact, scheme_of, zeros_off_by_one(name))
            assert sqnr_db(wanted, logits(wrong, family, torch.float32)) < bar, name
