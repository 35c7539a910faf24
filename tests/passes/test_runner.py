"""The runner: a copy in, a copy out; failures name the pass and leave the capture; traces are Python."""

import ast
import operator
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qpass.errors import QpassError, UnsupportedError
from qpass.passes import PIPELINE, canonicalize, fuse_epilogues, merge_siblings, quantize_linears, run_pipeline
from qpass.passes.runner import copy_graph_module, run
from tests.support.capture import Body, capture, context, rewrite
from tests.support.tolerance import assert_rounding_apart

X = torch.randn(3, 64)


def model():
    def body(m, x):
        y = F.silu(m.gate(x)) * m.up(x)
        return x + m.down(y), y.shape[0]

    return Body(body, gate=nn.Linear(64, 96), up=nn.Linear(64, 96), down=nn.Linear(96, 64))


def snapshot(gm):
    return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs), sorted(n.meta)) for n in gm.graph.nodes], gm.code


def failing(at):
    """The pipeline up to a pass that spoils the graph and then fails."""

    def spoil(graph, ctx):
        for node in list(graph.nodes):
            node.meta.clear()
        graph.output_node().args = ((),)
        raise at

    return [canonicalize, merge_siblings, spoil]


def test_the_whole_pipeline():
    captured = capture(model(), X)
    before = snapshot(captured.gm)
    gm, counts = run_pipeline(captured.gm, context(captured, "w4a16-g32", lowering="reference"))
    assert list(counts) == [step.__name__ for step in PIPELINE]
    assert counts["merge_siblings"] == 1
    assert counts["quantize_linears"] == 2
    assert counts["fuse_epilogues"] == 2
    assert snapshot(captured.gm) == before
    plain = rewrite(model(), (X,), [canonicalize])
    assert len(captured.run(gm)) == len(plain.outputs())


@pytest.mark.parametrize("error", [ValueError("boom"), KeyError("gone")])
def test_a_failure_names_the_pass_and_leaves_the_capture(error):
    captured = capture(model(), X)
    before = snapshot(captured.gm)
    with pytest.raises(QpassError, match=r"internal error in pass spoil: .*(boom|gone).*QPASS_TRACE") as caught:
        run(captured.gm, context(captured), failing(error))
    assert caught.value.__cause__ is error
    assert snapshot(captured.gm) == before
    captured.run()


def test_a_refusal_comes_through_as_it_is():
    captured = capture(model(), X)
    before = snapshot(captured.gm)
    with pytest.raises(UnsupportedError, match=r"^not here$"):
        run(captured.gm, context(captured), failing(UnsupportedError("not here")))
    assert snapshot(captured.gm) == before


def test_a_malformed_graph_is_found():
    def tangle(graph, ctx):
        first = next(n for n in graph.nodes if n.target is torch._C._nn.linear)
        graph.output_node().append(first)  # its users now come before it
        return 0

    captured = capture(model(), X)
    with pytest.raises(QpassError, match="internal error in pass tangle"):
        run(captured.gm, context(captured), [tangle])


def test_the_copy_keeps_what_aot_looks_for():
    captured = capture(model(), X)
    captured.gm._param_name_to_source = {"a": "b"}
    copied = copy_graph_module(captured.gm)
    assert copied.meta == captured.gm.meta
    assert copied.meta is not captured.gm.meta
    assert copied._param_name_to_source == {"a": "b"}
    assert copied._param_name_to_source is not captured.gm._param_name_to_source
    for old, new in zip(captured.gm.graph.nodes, copied.graph.nodes, strict=True):
        assert old is not new
        assert old.name == new.name
        assert old.meta is not new.meta
        assert getattr(old, "_dynamo_source", None) == getattr(new, "_dynamo_source", None)
    assert_rounding_apart(captured.run(), captured.run(copied))


@pytest.fixture
def traced(tmp_path, monkeypatch):
    monkeypatch.setenv("QPASS_TRACE", str(tmp_path / "trace"))
    return tmp_path / "trace"


def test_trace_files_are_python_that_computes_the_same(traced):
    done = rewrite(model(), (X,), [canonicalize, merge_siblings, quantize_linears, fuse_epilogues])
    files = sorted(path.name for path in (traced / "graph_000").iterdir())
    assert files == [
        "00_capture.py",
        "01_canonicalize.py",
        "02_merge_siblings.py",
        "03_quantize_linears.py",
        "04_fuse_epilogues.py",
    ]
    results = []
    for name in files:
        text = (traced / "graph_000" / name).read_text()
        ast.parse(text)
        namespace = {}
        exec(text, namespace)
        with torch.no_grad():
            results.append(namespace["forward"](done.gm, *done.capture.inputs))
    assert_rounding_apart(done.capture.run(), results[0])
    assert_rounding_apart(results[0], results[1])
    assert_rounding_apart(results[1], results[2])
    assert_rounding_apart(results[3], results[4])
    assert "float32[3, 192]  gate + up" in (traced / "graph_000" / files[2]).read_text()
    assert (traced / "graph_000" / files[2]).read_text().startswith("# qpass: after merge_siblings: 1 matches\n")


def test_what_a_lowering_emits_is_traced_as_python_too(traced):
    """Its functions live in modules of ours, which the file imports."""
    module = model()
    before = rewrite(module, (X,), PIPELINE[:-1], "w8a8-dynamic")
    done = rewrite(module, (X,), PIPELINE, "w8a8-dynamic", lowering="onednn")
    (path,) = (traced / "graph_001").glob("*_lower.py")
    text = path.read_text()
    assert "import qpass.lowering.onednn\n" in text
    namespace = {}
    exec(text, namespace)
    with torch.no_grad():
        assert_rounding_apart(before.outputs(), namespace["forward"](done.gm, *done.capture.inputs))


def test_each_graph_has_its_own_folder(traced):
    for _ in range(2):
        rewrite(model(), (X,), [canonicalize])
    assert sorted(path.name for path in traced.iterdir()) == ["graph_000", "graph_001"]


def test_a_failure_says_where_the_trace_is(traced):
    captured = capture(model(), X)
    with pytest.raises(QpassError, match=re.escape(str(traced / "graph_000"))):
        run(captured.gm, context(captured), failing(ValueError("boom")))
    assert (traced / "graph_000" / "03_spoil.py").exists()


def test_every_kind_of_constant_is_written_as_python(traced):
    def function(x):
        y = torch.full((2, 3), float("-inf"), dtype=torch.float64, device="cpu")[..., 1:, None]
        z = x.to(torch.float32).view((-1, 2))[:, [0]].squeeze(dim=1)
        return {"a": y, "b": (z, operator.getitem(x, slice(None, 2, 1)))}

    done = rewrite(function, (X,), [canonicalize])
    for path in (traced / "graph_000").iterdir():
        namespace = {}
        exec(path.read_text(), namespace)
        assert_rounding_apart(done.capture.run(), namespace["forward"](done.gm, *done.capture.inputs))
