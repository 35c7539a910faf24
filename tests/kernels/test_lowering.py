"""The lowering: what it refuses, and that a graph computes the same through it as by the op's own meaning."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import SERVES, sqnr_db
from torch import fx, nn

from qpass.algorithms.rtn import rtn
from qpass.cpu import Cpu, detect
from qpass.lowering import choose
from qpass.lowering.generated import Generated
from qpass.lowering.site import Site
from qpass.scheme import Scheme


def site(scheme: str, k: int = 256, dtype: torch.dtype = torch.bfloat16) -> Site:
    return Site(("layer",), 64, k, Scheme.parse(scheme), dtype)


@pytest.mark.skipif(not SERVES, reason="needs AVX2")
@pytest.mark.parametrize(
    "scheme",
    ["w4a16-g128", "w4a8-g32", "w8a16", "w8a8-dynamic", "w4a16", "w4a8", "w8a8-g64-asym", "w3a16-g64", "w2a8-g16-sym"],
)
def test_serves(scheme: str) -> None:
    assert Generated().refuse(site(scheme), detect()) is None


@pytest.mark.skipif(not SERVES, reason="needs AVX2")
def test_refuses_with_a_sentence() -> None:
    lowering, cpu = Generated(), detect()
    assert "quantized weights only" in str(lowering.refuse(site("w16a16"), cpu))
    assert "not float64" in str(lowering.refuse(site("w8a16", dtype=torch.float64), cpu))
    assert "overflow" in str(lowering.refuse(site("w8a8-dynamic", k=1 << 17), cpu))
    assert "tier none" in str(lowering.refuse(site("w8a16"), Cpu("an old one", "x", frozenset(), 1)))


def test_a_machine_without_avx2_gets_atens_kernels_and_the_reason() -> None:
    lowering, refusals = choose(site("w8a16"), Cpu("an old one", "x", frozenset({"sse4_2"}), 1))
    assert lowering.name == "aten"
    assert refusals[0] == (
        "generated: needs AVX2 with FMA, F16C and BMI2, or better; this CPU is an old one with tier none"
    )


def test_refuses_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    cpu = detect()
    assert Generated().refuse(site("w8a16"), cpu) is not None


@pytest.mark.skipif(not SERVES, reason="needs AVX2")
@pytest.mark.parametrize(
    "scheme",
    [
        "w4a16-g128",
        "w4a8-g32",
        "w8a16",
        "w8a8-dynamic",
        "w4a8",
        "w3a16-g64",
        "w3a8-g128-sym",
        "w2a16-g32",
        "w4a8-g32-floatzero",
        "w4a8-g128-intscale",
        "w2a8-g16-sym-intscale",
    ],
)
@pytest.mark.parametrize("glu", [False, True])
def test_emits_the_same_meaning(scheme: str, glu: bool) -> None:
    parsed = Scheme.parse(scheme)
    assert parsed.weight is not None
    weight = rtn(torch.randn(140, 300), parsed.weight)
    lowering = Generated()
    (packed,) = lowering.pack(weight, glu=glu)
    module = nn.Module()
    for name, tensor in (("codes", weight.codes), ("scales", weight.scales), ("zeros", weight.zeros)):
        module.register_buffer(name, tensor)
    graph = fx.Graph(module)
    x, residual = graph.placeholder("x"), graph.placeholder("residual")
    tensors = [graph.get_attr(name) for name in ("codes", "scales", "zeros")]
    arguments = (x, *tensors, None, parsed.weight.bits, parsed.weight.group or 0, parsed.activation)
    keywords = {"activation": "silu", "glu": glu, "residual": residual}
    graph.output(graph.call_function(torch.ops.qpass.quantized_linear.default, arguments, keywords))
    gm = fx.GraphModule(module, graph)
    inputs = (torch.randn(3, 300), torch.randn(3, 70 if glu else 140))
    expected = gm(*inputs)

    gm.register_buffer("packed", packed)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.qpass.quantized_linear.default)
    with gm.graph.inserting_before(node):
        attribute = gm.graph.get_attr("packed")
    node.meta["qpass_scheme"] = parsed
    node.replace_all_uses_with(lowering.emit(gm.graph, node, (attribute,)))
    gm.graph.erase_node(node)
    gm.recompile()
    bar = 100 if parsed.activation == "a16" else 45  # int8 activations may round a tie differently
    assert sqnr_db(expected, gm(*inputs)) > bar
