"""The doors: the backend's name, qpass.compile on a model, a class and a function, and what each refuses."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import qpass
from qpass.cpu import detect
from qpass.errors import OptionError, QpassError, ReleasedWeightError, SchemeError, UnsupportedError
from qpass.kernels.plan import SERVED


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(64, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return Net().to(torch.bfloat16).eval()


def inputs(rows: int = 3, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).to(dtype)


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    y, expected = y.detach().float(), expected.detach().float()
    return float((y - expected).norm() / expected.norm())


def test_backend_by_name(net: Net) -> None:
    fast = torch.compile(net, backend="qpass", fullgraph=True)
    x = inputs()
    assert relative_error(fast(x), net(x)) < 0.02  # int8 weights: half a step in 255
    explanation = qpass.explain(fast)
    assert [r.scheme for r in explanation.records] == ["w8a16"] * 5
    assert explanation.bytes_after < 0.7 * explanation.bytes_before


def test_a_root_of_torchs_own_classes_is_compiled() -> None:
    """Dynamo leaves the frames of torch.nn's own forwards alone: called directly they would run as they are."""
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).to(torch.bfloat16).eval()
    fast = qpass.compile(net, scheme={"0": "w4a16-g32"})
    assert 0 < relative_error(fast(inputs()), net(inputs())) < 0.2
    assert {r.name: r.scheme for r in qpass.explain(fast).records} == {"0": "w4a16-g32", "2": "w8a16"}


def test_backend_takes_options(net: Net) -> None:
    fast = torch.compile(net, backend="qpass", fullgraph=True, options={"scheme": "w4a16-g32", "exclude": ["head"]})
    error = relative_error(fast(inputs()), net(inputs()))
    assert 0.01 < error < 0.2  # four bits really happened
    schemes = {r.name: r.scheme for r in qpass.explain(fast).records}
    assert schemes["head"] == "w16a16"
    assert schemes["blocks.0.up"] == "w4a16-g32"


def test_two_compiled_forms_of_one_model_are_told_apart(net: Net) -> None:
    int8 = torch.compile(net, backend="qpass", options={"scheme": "w8a16"})
    int4 = torch.compile(net, backend="qpass", options={"scheme": "w4a16-g64"})
    int8(inputs()), int4(inputs())
    assert {r.scheme for r in qpass.explain(int8).records} == {"w8a16"}
    assert {r.scheme for r in qpass.explain(int4).records} == {"w4a16-g64"}


def test_compile_leaves_the_original_as_it_is(net: Net) -> None:
    before = net(inputs())
    fast = qpass.compile(net, scheme="w4a16-g32")
    assert type(fast) is type(net)
    assert not torch.equal(fast(inputs()), before)
    assert torch.equal(net(inputs()), before)


def test_class_decorator() -> None:
    @qpass.compile(scheme="w8a16", fullgraph=True)
    class Decorated(Net):
        pass

    net = Decorated().eval()
    net(inputs(dtype=torch.float32))
    assert len(qpass.explain(net).records) == 5


def test_function_decorator(net: Net) -> None:
    @qpass.compile(scheme={"head": "w4a16-g64", "blocks.*": "w8a16"})
    def forward(x: torch.Tensor) -> torch.Tensor:
        return net(x).float().softmax(-1)

    assert relative_error(forward(inputs()), net(inputs()).float().softmax(-1)) < 0.2
    schemes = [r.scheme for r in qpass.explain(forward).records]
    assert sorted(schemes) == ["w4a16-g64"] + ["w8a16"] * 4


def test_scheme_by_function(net: Net) -> None:
    fast = qpass.compile(net, scheme=lambda name: "w4a8-g64" if name.endswith("down") else "w16a16")
    fast(inputs())
    assert {r.name: r.scheme for r in qpass.explain(fast).records} == {
        "blocks.0.up": "w16a16",
        "blocks.0.down": "w4a8-g64",
        "blocks.1.up": "w16a16",
        "blocks.1.down": "w4a8-g64",
        "head": "w16a16",
    }


def test_weights_are_packed_once_for_all_graphs(net: Net) -> None:
    from qpass.frontends.backend import STORE

    fast = qpass.compile(net, dynamic=False)
    before = STORE.packed_count
    for rows in (1, 3, 7):
        fast(inputs(rows))
    assert len(qpass.explain(fast).graphs) == 3
    assert STORE.packed_count - before == 5


def test_packed_weights_die_with_the_model() -> None:
    from qpass.frontends.backend import STORE

    torch._dynamo.reset()
    gc.collect()
    before = len(STORE.entries)
    net = Net().eval()
    qpass.compile(net)(inputs(dtype=torch.float32))
    assert len(STORE.entries) == before + 5
    del net
    torch._dynamo.reset()
    gc.collect()
    assert len(STORE.entries) == before


def test_a_weight_written_to_is_packed_anew(net: Net) -> None:
    fast = qpass.compile(net, dynamic=False)
    fast(inputs())
    with torch.no_grad():
        net.head.weight.mul_(2)
    again = qpass.compile(net, dynamic=False)
    assert relative_error(again(inputs()), net(inputs())) < 0.02


class TestRelease:
    def test_compiled_use_goes_on_and_eager_use_names_the_weight(self, net: Net) -> None:
        expected = {rows: net(inputs(rows)) for rows in (1, 3, 7)}
        fast = qpass.compile(net, release_weights=True, dynamic=False)
        for rows, y in expected.items():  # a graph a row count: recompiles after the release
            assert relative_error(fast(inputs(rows)), y) < 0.02
        for use in (
            lambda: net(inputs()),
            net.state_dict,
            lambda: net.head.weight + 1,
            lambda: net.head.weight.data,
            lambda: copy.deepcopy(net),
            lambda: net.blocks[0](inputs()),
        ):
            with pytest.raises(ReleasedWeightError, match=r"weight"):
                use()
        with pytest.raises(ReleasedWeightError, match=r"head\.weight"):
            net.head.weight.float()
        assert net.head.weight.shape == (96, 64)
        assert "head.weight" in repr(net.head.weight)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(96, 64)
            self.mix = nn.Linear(64, 64)
            self.lm_head = nn.Linear(64, 96, bias=False)
            self.lm_head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.lm_head(self.mix(self.embed(ids)))

    @pytest.mark.skipif(detect().tier not in SERVED, reason="needs AVX2")
    def test_tied_embedding_goes_with_its_head(self) -> None:
        net, ids = self.Tied().eval(), torch.arange(5)
        expected = net(ids)
        fast = qpass.compile(net, scheme="w4a16-g32", release_weights=True, fullgraph=True)
        first = fast(ids)
        assert relative_error(first, expected) < 0.2
        records = {r.name: r for r in qpass.explain(fast).records}
        assert records["lm_head"].scheme == records["embed"].scheme == "w8a16"  # a head keeps eight bits
        assert records["embed"].notes == ("shares the table of lm_head",)
        with pytest.raises(ReleasedWeightError, match=r"lm_head\.weight"):
            net.embed(ids)
        assert torch.allclose(fast(ids[:3]), first[:3], atol=1e-5)  # another length is another graph

    @pytest.mark.skipif(detect().tier not in SERVED, reason="needs AVX2")
    def test_an_embedding_without_its_head_needs_the_released_table(self) -> None:
        """A graph of the embedding alone keeps the plain table, which is gone; the head's graph goes on."""
        net, ids = self.Tied().eval(), torch.arange(5)
        fast = qpass.compile(net, release_weights=True, fullgraph=True)
        first = fast(ids)
        headless = qpass.compile(lambda ids: net.mix(net.embed(ids)), fullgraph=True)
        with pytest.raises(ReleasedWeightError, match=r"lm_head\.weight: its full-precision data was released"):
            headless(ids)
        assert torch.equal(fast(ids), first)

    @pytest.mark.skipif(detect().tier not in SERVED, reason="needs AVX2")
    def test_the_rows_line_of_a_tied_model(self) -> None:
        """Rows of a shared table are copied: they don't take the promise of the linears away."""
        net, ids = self.Tied().eval(), torch.arange(5)
        fast = qpass.compile(net, scheme="w8a8-dynamic", fullgraph=True)
        fast(ids)
        explanation = qpass.explain(fast)
        assert "shares the table of lm_head" in str(explanation)
        (line,) = (line for line in str(explanation).splitlines() if line.startswith("rows:"))
        assert line == "rows: every linear gives a token the same bits, however many are computed at once"

    def test_tied_embedding_stays_where_it_is_read(self) -> None:
        """A head of four bits shares no table with its embedding."""
        net, ids = self.Tied().eval(), torch.arange(5)
        expected = net(ids)
        fast = qpass.compile(net, scheme={"*": "w4a16-g32", "lm_head": "w4a16-g32"}, release_weights=True)
        assert relative_error(fast(ids), expected) < 0.3
        assert torch.equal(net.embed(ids), net.embed.weight[ids])  # still readable
        with pytest.raises(ReleasedWeightError, match=r"mix\.weight"):
            net.mix(expected[:, :64])

    def test_reports_the_bytes(self, net: Net) -> None:
        fast = qpass.compile(net, release_weights=True)
        fast(inputs())
        (graph,) = qpass.explain(fast).graphs
        assert graph.released_bytes == qpass.explain(fast).bytes_before


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"scheme": "w5a16"}, SchemeError, ["w5a16", "-g<16|32|64|128>"]),
            ({"scheme": "w4a16-g48"}, SchemeError, ["48", "16, 32, 64, 128"]),
            ({"scheme": 4}, SchemeError, ["int"]),
            ({"scheme": {"nothing.*": "w8a16"}}, OptionError, ["nothing.*", "blocks.0.down"]),
            ({"exclude": ["lm_head"]}, OptionError, ["lm_head", "head"]),
            ({"lowering": "cuda"}, OptionError, ["cuda", "generated, onednn, aten, reference"]),
            ({"release_weights": "yes"}, OptionError, ["yes", "True or False"]),
        ],
    )
    def test_arguments(self, net: Net, arguments: dict, error: type, words: list[str]) -> None:
        with pytest.raises(error) as caught:
            qpass.compile(net, **arguments)
        assert all(word in str(caught.value) for word in words)

    def test_unknown_option_by_name(self, net: Net) -> None:
        fast = torch.compile(net, backend="qpass", options={"shceme": "w8a16"})
        with pytest.raises(OptionError, match=r"unknown option 'shceme'.*accepted: scheme, exclude"):
            fast(inputs())

    def test_mode_by_name(self, net: Net) -> None:
        with pytest.raises(OptionError, match="no mode 'max-autotune'"):
            torch.compile(net, backend="qpass", mode="max-autotune")(inputs())

    def test_pattern_without_match_by_name(self, net: Net) -> None:
        with pytest.raises(OptionError, match=r"'lm_head' matches none of the linear layers: .*blocks\.0\.up"):
            torch.compile(net, backend="qpass", options={"exclude": ["lm_head"]})(inputs())

    def test_training_mode(self, net: Net) -> None:
        with pytest.raises(UnsupportedError, match=r"training mode.*call \.eval\(\)"):
            qpass.compile(net.train())(inputs())

    def test_dropout_in_training_by_name(self) -> None:
        net = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1))
        with pytest.raises(UnsupportedError, match=r"dropout in training mode.*model\.eval\(\)"):
            torch.compile(net, backend="qpass")(torch.randn(2, 64))

    def test_input_that_requires_grad(self, net: Net) -> None:
        with pytest.raises(UnsupportedError, match=r"requires grad.*detached"):
            qpass.compile(net)(inputs().requires_grad_())

    def test_other_device(self) -> None:
        with pytest.raises(UnsupportedError, match=r"head\.weight is on meta|blocks\.0\.up\.weight is on meta"):
            qpass.compile(Net().to("meta"))

    def test_dtype(self) -> None:
        with pytest.raises(UnsupportedError, match=r"blocks\.0\.up.*float64.*bfloat16, float16, float32"):
            qpass.compile(Net().double().eval())(torch.randn(2, 64, dtype=torch.float64))

    def test_lowering_that_refuses(self, net: Net) -> None:
        with pytest.raises(UnsupportedError, match=r"blocks\.0\.up .*w4a16-g32: onednn: serves int8 weights"):
            qpass.compile(net, scheme="w4a16-g32", lowering="onednn")(inputs())

    def test_not_a_model(self) -> None:
        with pytest.raises(OptionError, match="not int"):
            qpass.compile(3)
        with pytest.raises(OptionError, match="not int"):
            qpass.explain(3)

    def test_a_failure_inside_is_never_a_silent_eager_run(self, net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._subclasses.fake_tensor import UnsupportedOperatorException

        from qpass.frontends import backend

        def fail(*args: object, **kwargs: object) -> None:
            raise UnsupportedOperatorException(torch.ops.aten.add.Tensor)

        monkeypatch.setattr(backend, "compile_fx", fail)
        with pytest.raises(QpassError, match="Inductor could not compile"):
            qpass.compile(net, fullgraph=False)(inputs())


@pytest.mark.parametrize("lowering", ["generated", "onednn", "aten", "reference"])
def test_every_lowering_gives_the_same(net: Net, lowering: str) -> None:
    scheme = "w8a8-dynamic" if lowering == "onednn" else "w8a16"
    fast = qpass.compile(net, scheme=scheme, lowering=lowering, fullgraph=True)
    reference = qpass.compile(net, scheme=scheme, lowering="reference", fullgraph=True)
    assert relative_error(fast(inputs()), reference(inputs())) < 0.01  # bf16 roundings of five layers
    assert {r.lowering for r in qpass.explain(fast).records} == {lowering}


def test_fallback_is_visible(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    from qpass.lowering import ORDER

    monkeypatch.setattr(type(ORDER[0]), "refuse", lambda self, site, cpu: "this CPU has neither AVX-512 VNNI nor AMX")
    fast = qpass.compile(net)
    fast(inputs())
    assert {r.lowering for r in qpass.explain(fast).records} == {"aten"}
    assert "neither AVX-512 VNNI nor AMX" in str(qpass.explain(fast))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"scheme": "w4a8-g64"}, "same bits"), ({"scheme": "w8a16", "lowering": "aten"}, "may depend")],
)
def test_explain_tells_whose_rows_are_the_same(net: Net, arguments: dict[str, str], words: str) -> None:
    fast = qpass.compile(net, fullgraph=True, **arguments)
    fast(inputs())
    line = next(line for line in str(qpass.explain(fast)).splitlines() if line.startswith("rows:"))
    assert words in line
