"""Every lowering computes what the op says, with norm, bias, gate and residual around the product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from qpass.algorithms.rtn import rtn
from qpass.cpu import detect
from qpass.lowering import Site, by_name
from qpass.scheme import Scheme
from tests.support.tolerance import sqnr_db

QUANTIZED = torch.ops.qpass.quantized_linear.default
CASES = [
    ("generated", "w4a16-g64"),
    ("generated", "w8a8-dynamic"),
    ("aten", "w8a16"),
    ("aten", "w4a16-g32"),
    ("onednn", "w8a8-dynamic"),
    ("reference", "w4a8-g32"),
]


def emitted(lowering: str, scheme: Scheme, inputs: dict[str, Tensor], **keywords: object) -> tuple[Tensor, Tensor]:
    """The op's own result, and that of the nodes which the lowering puts in its place."""
    chosen, module = by_name(lowering), nn.Module()
    assert scheme.weight is not None
    weight = rtn(torch.randn(128, 256), scheme.weight)
    packed = chosen.pack(weight, glu=bool(keywords.get("glu")))
    tensors = {"codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros, "bias": torch.randn(128)}
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    graph = fx.Graph(module)
    nodes = {name: graph.placeholder(name) for name in inputs}
    attributes = [graph.get_attr(name) for name in tensors]
    x, others = nodes.pop("x"), nodes
    format = (scheme.weight.bits, scheme.weight.group or 0, scheme.activation)
    graph.output(graph.call_function(QUANTIZED, (x, *attributes, *format), keywords | others))
    gm = fx.GraphModule(module, graph)
    expected = gm(*inputs.values())
    for i, tensor in enumerate(packed):
        gm.register_buffer(f"packed_{i}", tensor)
    (node,) = gm.graph.find_nodes(op="call_function", target=QUANTIZED)
    with gm.graph.inserting_before(node):
        operands = tuple(gm.graph.get_attr(f"packed_{i}") for i in range(len(packed)))
    new = chosen.emit(gm.graph, node, operands)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    gm.recompile()
    return expected, gm(*inputs.values())


@pytest.mark.parametrize(("lowering", "name"), CASES)
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_with_a_norm(lowering: str, name: str, norm: str) -> None:
    torch.manual_seed(0)
    scheme = Scheme.parse(name)
    refusal = by_name(lowering).refuse(Site(("fc",), 128, 256, scheme, torch.bfloat16), detect())
    if refusal is not None:
        pytest.skip(refusal)
    inputs = {"x": (3 * torch.randn(2, 5, 256) + 1).bfloat16(), "residual": torch.randn(2, 5, 64).bfloat16()}
    keywords: dict[str, object] = {"activation": "silu", "glu": True}
    if norm != "none":
        inputs |= {"norm_weight": torch.rand(256) + 0.5, "norm_bias": torch.randn(256)}
        keywords |= {"norm": norm, "norm_eps": 1e-5}
    expected, result = emitted(lowering, scheme, inputs, **keywords)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    # bf16 output leaves about 50 dB; ATen's kernels round their product to bf16 in front of the epilogue, and their scales.
    assert sqnr_db(expected, result) > (32 if lowering == "aten" else 42)


@pytest.mark.parametrize("lowering", ["generated", "onednn", "reference"])
@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("rotate", [False, True])
def test_asymmetric_codes(lowering: str, norm: str, rotate: bool) -> None:
    """Of what goes in, and of what comes out for a linear behind."""
    torch.manual_seed(0)
    scheme = Scheme.parse("w8a8-static")
    refusal = by_name(lowering).refuse(Site(("fc",), 128, 256, scheme, torch.bfloat16), detect())
    if refusal is not None:
        pytest.skip(refusal)
    keywords: dict[str, object] = {"x_scale": 0.02, "x_shift": 2.0, "rotate": rotate, "norm": norm, "norm_eps": 1e-5}
    inputs = {"x": (torch.rand(2, 5, 256) * 4).bfloat16()}
    expected, result = emitted(lowering, scheme, inputs, **keywords)
    assert sqnr_db(expected, result) > 42
    outward: dict[str, object] = {"y_scale": 0.2, "y_shift": -3.0, "y_rotate": rotate}
    expected, result = emitted(lowering, scheme, inputs, **keywords, **outward)
    assert (result.dtype, expected.float().abs().max() > 10) == (torch.int8, True)
    assert (expected.float() - result.float()).abs().max() <= 2
    codes = {"x": torch.randint(-127, 128, (2, 5, 256), dtype=torch.int8)}
    inward: dict[str, object] = {"x_scale": 0.02, "x_shift": 2.0, "rotate": rotate, "dtype": torch.bfloat16}
    expected, result = emitted(lowering, scheme, codes, **inward)
    assert sqnr_db(expected, result) > 42


@pytest.mark.parametrize("lowering", ["generated", "onednn", "reference"])
@pytest.mark.parametrize("name", ["w8a8-dynamic", "w8a8-static"])
def test_with_outliers(lowering: str, name: str) -> None:
    """Normalized with the rest, never quantized."""
    torch.manual_seed(0)
    scheme = Scheme.parse(name)
    refusal = by_name(lowering).refuse(Site(("fc",), 128, 256, scheme, torch.bfloat16), detect())
    if refusal is not None:
        pytest.skip(refusal)
    few = torch.tensor([3, 64, 255])
    x = torch.randn(2, 5, 256).index_fill(-1, few, 40.0).bfloat16()
    inputs = {"x": x, "outliers": few, "outlier_weight": torch.randn(3, 128).bfloat16()}
    keywords: dict[str, object] = {"norm": "rms", "norm_eps": 1e-5, "activation": "silu", "glu": True}
    if name == "w8a8-static":
        keywords["x_scale"] = 0.02
    expected, result = emitted(lowering, scheme, inputs, **keywords)
    assert sqnr_db(expected, result) > 42
