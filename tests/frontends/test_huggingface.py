"""transformers' from_pretrained and save_pretrained over our artefact, and what a loaded model can do."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import qpass
from qpass.algorithms.rtn import rtn
from qpass.checkpoints.artefact import checksum
from qpass.checkpoints.bits import unpack_bits
from qpass.errors import CheckpointError, OptionError, ReleasedWeightError, SchemeError
from qpass.lowering.given import given_of
from qpass.scheme import Scheme

IDS = torch.arange(2, 12)[None]
GATE = "model.layers.0.mlp.gate_proj"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def quantized(checkpoint: Path) -> Any:
    config = qpass.QPassConfig(scheme={"*": "w4a16-g32", "model.layers.1.*": "w3a16-g64"}, exclude="*.o_proj")
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)


@pytest.fixture(scope="module")
def artefact(quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact")
    quantized.save_pretrained(folder)
    return folder


def test_a_model_is_quantized_as_it_is_read(checkpoint: Path, quantized: Any) -> None:
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name, module in plain.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        given = given_of(quantized.get_parameter(f"{name}.weight"))
        if name.endswith("o_proj"):
            assert given is None
            continue
        scheme = "w3a16-g64" if ".1." in name else "w8a16" if name == "lm_head" else "w4a16-g32"
        assert given is not None
        expected, found = rtn(module.weight, Scheme.parse(scheme).weight), given.read()
        assert found.format == expected.format
        for part in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(found, part), getattr(expected, part)), name


def test_a_linear_runs_on_its_codes_outside_of_any_graph(quantized: Any) -> None:
    module = quantized.get_submodule(GATE)
    assert type(module) is nn.Linear
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        out = module(x)
    expected = x.float() @ given_of(module.weight).read().dequantize().t()
    assert float((out - expected).norm() / expected.norm()) < 4e-3  # one rounding to bf16
    with pytest.raises(ReleasedWeightError, match=GATE):
        module.weight.sum()


def test_it_comes_back_bit_for_bit(quantized: Any, artefact: Path) -> None:
    again = AutoModelForCausalLM.from_pretrained(artefact)
    assert torch.equal(logits(again), logits(quantized))
    again.save_pretrained(artefact)  # over itself, while its codes are mapped from there
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(artefact)), logits(quantized))


def test_the_file_is_as_documented(quantized: Any, artefact: Path) -> None:
    config = json.loads((artefact / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "qpass"
    assert config["version"] == 1
    assert config["modules"][GATE] | {"crc32": 0} == {
        "bits": 4, "group": 32, "symmetric": False, "float_zeros": False, "activation": "a16", "source": "rtn", "crc32": 0
    }  # fmt: skip
    with safe_open(artefact / "model.safetensors", "pt") as file:
        assert f"{GATE}.weight" not in file.keys()  # noqa: SIM118
        codes, scales, zeros = (file.get_tensor(f"{GATE}.qpass_{part}") for part in ("codes", "scales", "zeros"))
        assert (codes.shape, scales.dtype) == ((96, 32), torch.float16)
        weight = (unpack_bits(codes, 4, 64).float().view(96, 2, 32) - zeros[..., None]) * scales.float()[..., None]
        third = file.get_tensor("model.layers.1.mlp.down_proj.qpass_codes")
        assert third.shape == (64, 36)  # 96 codes of 3 bits
    expected = given_of(quantized.get_submodule(GATE).weight).read().dequantize()
    assert torch.equal(weight.view(96, 64), expected)


def test_integer_scales_come_back_and_others_are_told(checkpoint: Path, artefact: Path, tmp_path: Path) -> None:
    config = qpass.QPassConfig(scheme="w4a8-g32-intscale")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    model.save_pretrained(tmp_path / "own")
    entry = json.loads((tmp_path / "own" / "config.json").read_text())["quantization_config"]["modules"][GATE]
    assert (entry["integer_scales"], entry["activation"]) == (True, "a8-token")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "own")), logits(model))

    def claim(config: dict, folder: Path) -> None:
        config["modules"][GATE]["integer_scales"] = True
        config["checksum"] = checksum(config["modules"])

    folder = damaged(artefact, tmp_path / "copy", claim)
    with pytest.raises(CheckpointError, match=f"{GATE}.qpass_scales: a row's scales are no whole multiples"):
        logits(AutoModelForCausalLM.from_pretrained(folder))


def test_importing_qpass_is_all_that_from_pretrained_needs(artefact: Path) -> None:
    code = (
        "import sys, qpass; assert 'torch' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert 'Released' in repr(model.lm_head.weight), model.lm_head.weight\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(artefact)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_generate_pipeline_copy_and_dtype(artefact: Path, checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artefact)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ask: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    out = model.generate(IDS, **ask)
    assert out.shape == (1, 16) or out[0, -1] == 1
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("hello", **ask)[0]["generated_text"]
    assert text.startswith("hello")
    before = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), before)
    assert torch.equal(logits(model.to("cpu")), before)
    block = model.model.layers[0].mlp
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        half, full = block(x.bfloat16()), block.float()(x)
    assert (block.gate_proj.weight.dtype, full.dtype) == (torch.float32, torch.float32)
    assert (half.float() - full).norm() < 0.02 * full.norm()  # bf16 keeps 8 bits


def test_a_plain_model_with_codes_is_saved_too(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(OptionError, match="no weight of this model has codes"):
        qpass.save(model, tmp_path / "none")
    from qpass.lowering.given import Given, give

    weight = model.get_parameter(f"{GATE}.weight")
    order, divisor = torch.randperm(64), torch.rand(64) + 0.5
    codes = rtn(weight.detach()[:, order] * divisor[order], Scheme.parse("w4a8-g32").weight)
    give(weight, Given.of(codes, divisor=divisor, order=order, activation="a8-token-group", source="gptq"))
    qpass.save(model, tmp_path / "saved", calibration={"algorithm": "gptq", "fingerprint": "abc"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    found = given_of(again.get_parameter(f"{GATE}.weight"))
    assert torch.equal(found.order, order)
    assert torch.equal(found.divisor, divisor)
    assert (found.activation, found.source) == ("a8-token-group", "gptq")
    assert torch.equal(found.read().codes, codes.codes)
    assert again.config.quantization_config.calibration == {"algorithm": "gptq", "fingerprint": "abc"}
    x = torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        out = again.get_submodule(GATE)(x).float()
        expected = model.get_submodule(GATE)(x).float()
    assert float((out - expected).norm() / expected.norm()) < 0.15


def test_wrong_wishes(checkpoint: Path, artefact: Path) -> None:
    with pytest.raises(SchemeError, match="w5a16"):
        qpass.QPassConfig(scheme="w5a16")
    with pytest.raises(OptionError, match="matches none of the linear layers"):
        AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=qpass.QPassConfig(exclude="nothing.*"))
    with pytest.raises(OptionError, match="quantized already"):
        qpass.load(artefact, scheme="w4a16")


def test_weights_that_are_nan(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.get_parameter(f"{GATE}.weight").data[3, 5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{GATE}.weight: the weight holds NaN or infinity"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=qpass.QPassConfig("w4a16-g32"))


def test_a_state_dict_names_and_cannot_be_written(quantized: Any, tmp_path: Path) -> None:
    state = quantized.state_dict()
    assert state[f"{GATE}.weight"].shape == (96, 64)
    for write in (lambda: torch.save(state, tmp_path / "x"), lambda: save_file(state, tmp_path / "x")):
        with pytest.raises(ReleasedWeightError, match=r"is not there"):
            write()


def damaged(artefact: Path, folder: Path, change: Any) -> Path:
    """A copy of an artefact whose config ``change`` tampers with."""
    folder.mkdir()
    for path in artefact.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"], folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _flip(config: dict[str, Any], folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    with safe_open(path, "pt") as file:
        needle = file.get_tensor(f"{GATE}.qpass_codes").numpy().tobytes()
    at = bytes(data).index(needle)
    data[at + 7] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, folder: config.update(version=2), r"config.json: version: is 2; accepted: 1"),
        (lambda config, folder: config["modules"][GATE].update(bits=2), r"config.json: checksum: doesn't fit"),
        (_flip, rf"model.safetensors: {GATE}.qpass_codes: doesn't fit its checksum"),
    ],
    ids=["version", "table", "codes"],
)
def test_damage_is_told(artefact: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder = damaged(artefact, tmp_path / "copy", change)
    with pytest.raises(CheckpointError, match=message):
        logits(AutoModelForCausalLM.from_pretrained(folder))
