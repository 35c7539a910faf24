"""IPEX' names: the schemes they stand for, what is refused and with which words, and its tutorials."""

import pathlib
import runpy
import sys

import pytest
import torch
from torch import nn

import qpass
import qpass.ipex as ipex
from qpass.errors import OptionError, UnsupportedError
from qpass.frontends import backend
from qpass.frontends import ipex as names
from qpass.ipex.quantization import (
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    WoqWeightQScheme,
    convert,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)
from qpass.scheme import Scheme

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples" / "ipex"
INT8, INT4 = WoqWeightDtype.INT8, WoqWeightDtype.INT4


@pytest.mark.parametrize(
    ("arguments", "scheme"),
    [
        ({}, "w8a16"),
        ({"weight_dtype": INT8, "lowp_mode": WoqLowpMode.BF16}, "w8a16"),
        ({"weight_dtype": INT8, "lowp_mode": WoqLowpMode.FP16, "group_size": 64}, "w8a16-g64"),
        ({"weight_dtype": INT8, "lowp_mode": WoqLowpMode.INT8}, "w8a8-dynamic"),
        ({"weight_dtype": INT8, "weight_qscheme": WoqWeightQScheme.ASYMMETRIC}, "w8a16-asym"),
        ({"weight_dtype": INT8, "weight_qscheme": WoqWeightQScheme.SYMMETRIC}, "w8a16"),
        ({"weight_dtype": INT4}, "w4a16"),
        ({"weight_dtype": INT4, "group_size": 128}, "w4a16-g128"),
        ({"weight_dtype": INT4, "group_size": 128, "lowp_mode": WoqLowpMode.INT8}, "w4a8-g128"),
        ({"weight_dtype": 2, "group_size": 32, "lowp_mode": 3, "act_quant_mode": 3}, "w4a8-g32"),
        ({"weight_dtype": INT4, "lowp_mode": WoqLowpMode.INT8, "act_quant_mode": WoqActQuantMode.PER_BATCH}, "w4a8-dynamic"),
        ({"weight_dtype": INT4, "group_size": 64, "weight_qscheme": WoqWeightQScheme.SYMMETRIC}, "w4a16-g64-sym"),
        # IPEX ignores the mode unless activations are quantized.
        ({"weight_dtype": INT4, "act_quant_mode": WoqActQuantMode.PER_TENSOR}, "w4a16"),
    ],
)  # fmt: skip
def test_a_mapping_is_a_scheme(arguments, scheme):
    found = get_weight_only_quant_qconfig_mapping(**arguments)
    assert found.scheme == scheme
    assert not found.calibrates
    assert Scheme.parse(found.scheme).quantizes


def test_the_types_of_older_releases_are_taken_with_a_warning():
    with pytest.warns(UserWarning, match="deprecated"):
        assert get_weight_only_quant_qconfig_mapping(weight_dtype=torch.quint4x2).scheme == "w4a16"
    with pytest.warns(UserWarning, match="deprecated"):
        assert get_weight_only_quant_qconfig_mapping(weight_dtype=torch.qint8).scheme == "w8a16"


LOW = {"weight_dtype": INT4, "lowp_mode": WoqLowpMode.INT8}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight_dtype": WoqWeightDtype.NF4}, UnsupportedError, "use WoqWeightDtype.INT4 with group_size=64"),
        ({"group_size": 256}, UnsupportedError, "group_size 256 has no equal; accepted: -1 and 16, 32, 64, 128"),
        ({**LOW, "act_quant_mode": WoqActQuantMode.PER_TENSOR}, UnsupportedError, "use PER_BATCH_SYM"),
        ({**LOW, "act_quant_mode": WoqActQuantMode.PER_IC_BLOCK_SYM}, UnsupportedError, "use PER_BATCH_SYM"),
        ({**LOW, "act_quant_mode": WoqActQuantMode.PER_BATCH_SYM, "group_size": 64}, UnsupportedError, "scheme 'w4a8-g64'"),
        ({**LOW, "act_quant_mode": WoqActQuantMode.NONE}, OptionError, "needs an act_quant_mode"),
        ({"weight_dtype": 7}, OptionError, "weight_dtype is 7; accepted: WoqWeightDtype.INT8"),
        ({"lowp_mode": 9}, OptionError, "lowp_mode is 9"),
    ],
)  # fmt: skip
def test_what_has_no_equal_says_what_has(arguments, error, message):
    with pytest.raises(error, match=message):
        get_weight_only_quant_qconfig_mapping(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer": object()}, UnsupportedError, "training"),
        ({"device": "xpu"}, UnsupportedError, "device is 'xpu'"),
        ({"low_precision_checkpoint": {}}, UnsupportedError, r"qpass.load\(its folder\)"),
        ({"quantization_config": "int8"}, OptionError, "quantization_config is a str"),
    ],
)
def test_optimize_refuses_with_the_way_to_say_it(arguments, error, message):
    with pytest.raises(error, match=message):
        ipex.llm.optimize(nn.Linear(4, 4), **arguments)


def test_optimize_compiles_with_the_scheme_that_the_config_says(monkeypatch):
    seen = {}
    monkeypatch.setattr(names, "compile", lambda model, **how: seen.update(how, model=model) or model)
    model = nn.Linear(4, 4)
    qconfig = get_weight_only_quant_qconfig_mapping(weight_dtype=INT4, group_size=32)
    ipex.llm.optimize(model, quantization_config=qconfig)
    assert seen == {"scheme": "w4a16-g32", "release_weights": False, "model": model}
    ipex.llm.optimize(model, dtype=torch.bfloat16, inplace=True)
    assert (seen["scheme"], seen["release_weights"]) == ("w16a16", True)
    assert model.weight.dtype == torch.bfloat16
    ipex.optimize(model, dtype=torch.float32)
    assert seen["model"].weight.dtype == torch.float32
    assert model.weight.dtype == torch.bfloat16  # a copy: not in place
    assert convert(prepare(model, qconfig)) is model
    assert seen["scheme"] == "w4a16-g32"
    smooth = get_smooth_quant_qconfig_mapping(alpha=0.7)
    assert ipex.llm.optimize(model, quantization_config=smooth) is model  # to be calibrated
    ipex.llm.optimize(model, quantization_config=smooth, qconfig_summary_file="stats")
    assert (seen["scheme"], seen["stats"], seen["alpha"]) == ("w8a8-static", "stats", 0.7)


@pytest.fixture
def _passes_alone(monkeypatch):
    """The rewritten graphs run as they are: what Inductor makes of them is tested elsewhere."""
    monkeypatch.setattr(backend, "compile_fx", lambda gm, inputs, **options: gm.forward)


@pytest.mark.usefixtures("_passes_alone")
def test_the_weight_only_tutorial_runs(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["weight_only.py", str(checkpoint)])
    made = runpy.run_path(str(EXAMPLES / "weight_only.py"))
    assert capsys.readouterr().out.startswith("The capital of France is")
    schemes = {record.scheme for record in qpass.explain(made["model"]).records}
    assert schemes == {"w8a16"}


@pytest.mark.usefixtures("_passes_alone")
def test_the_smooth_quant_tutorial_runs(checkpoint, monkeypatch, capsys, tmp_path):
    summary = tmp_path / "summary.safetensors"
    monkeypatch.setattr(sys, "argv", ["smooth_quant.py", str(checkpoint), str(summary)])
    made = runpy.run_path(str(EXAMPLES / "smooth_quant.py"))
    assert capsys.readouterr().out.startswith("def add(a, b):")
    assert qpass.Statistics.load(summary).tokens == 4 * 64
    schemes = {r.name: r.scheme for r in qpass.explain(made["model"]).records}
    assert schemes.pop("lm_head") == "w8a16"  # a head has no static scale
    assert set(schemes.values()) == {"w8a8-static"}


def test_a_prepared_model_keeps_what_it_was_called_on(checkpoint, tmp_path):
    from qpass.frontends.hf import load

    model = load(checkpoint).model
    ids = torch.arange(2, 82)[None]
    prepared = prepare(model, get_smooth_quant_qconfig_mapping(), example_inputs=ids)
    out = prepared(ids)
    assert torch.equal(out.logits, model(ids).logits)
    prepared({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    prepared(input_ids=ids)
    assert prepared.statistics().tokens == 3 * 80
    prepared.save_qconf_summary(qconf_summary=tmp_path / "s")
    again = prepare(model, get_smooth_quant_qconfig_mapping())
    again.load_qconf_summary(tmp_path / "s")
    assert again.statistics().tokens == 240
    with pytest.raises(UnsupportedError, match="needs no calibration"):
        prepare(model, get_weight_only_quant_qconfig_mapping()).save_qconf_summary(tmp_path / "t")
