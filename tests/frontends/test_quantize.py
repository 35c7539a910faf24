"""qpass.quantize: every family's blocks, better codes than rounding, the same numbers compiled, and work that can be resumed."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qpass
from qpass.algorithms.rtn import rtn
from qpass.errors import CheckpointError, OptionError, SchemeError
from qpass.frontends import blocks, quantize
from qpass.frontends.huggingface import save
from qpass.lowering.given import given_of
from qpass.lowering.released import release
from qpass.passes import canonicalize, fold_smoothing, merge_siblings, quantize_linears
from qpass.runtime.decoder import Decoder
from qpass.runtime.shorten import first_layers
from qpass.runtime.speculate import Speculator
from qpass.scheme import Format
from tests.support import tiny_models
from tests.support.capture import capture, context
from tests.support.capture import run as run_passes

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
import tiny_decoders
from drafts import Oracle

DECODERS = [family for family in tiny_models.CONFIGS if family not in ("bert", "vit")]
SCHEME = "w4a16-g32"


def _data(seed: int = 0, rows: int = 6, length: int = 40) -> Tensor:
    """Tokens that repeat themselves as a text does, int64 [rows, length]."""
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(3, tiny_models.VOCABULARY, (12, 4), generator=torch.Generator().manual_seed(99))
    return words[torch.randint(0, 12, (rows, length // 4), generator=g)].reshape(rows, length)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


@pytest.fixture
def llama():
    return tiny_models.build("llama", torch.float32)


@pytest.mark.parametrize("family", DECODERS)
def test_blocks_one_after_the_other_are_the_model(family: str) -> None:
    model = tiny_models.build(family, torch.float32)
    ids, leaving = _data(rows=2), []
    found = blocks.split(model, [((), {"input_ids": row[None]}) for row in ids])
    assert not found.is_whole
    assert len(found.modules) == 2
    with torch.no_grad():
        for index in range(2):
            found.advance(index)
        hook = found.modules[-1].register_forward_hook(
            lambda module, args, out: leaving.append(out if isinstance(out, Tensor) else out[0])
        )
        for row in ids:
            model(input_ids=row[None], use_cache=False)
        hook.remove()
    for mine, theirs in zip(found.hidden, leaving, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", ["llama_awkward", "gpt2", "gemma3", "falcon", "mixtral"])
def test_every_linear_of_a_family_gets_codes(family: str) -> None:
    model = tiny_models.build(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        qpass.quantize(model, _data(), scheme=SCHEME)
    assert any("3-D expert weights" in str(w.message) for w in said) == (family == "mixtral")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            given = given_of(module.weight)
            assert given is not None, name
            rows, columns = module.weight.shape
            n, k = (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)
            weight = given.read()
            assert (weight.n, weight.k) == (n, k)
            inside = "lm_head" not in name and name.rpartition(".")[2] != "gate"
            assert weight.format == (Format(4, 32) if inside else Format(8, None, True))
            assert given.source == ("rtn" if name == "lm_head" else "gptq")
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def _damage(model: nn.Module, algorithm: str, scheme: str = "w3a16-g32") -> float:
    """Mean squared error of the logits on text that wasn't calibrated on."""
    ids = _data(seed=7)
    wanted = _logits(model, ids)
    quantized = qpass.quantize(
        copy.deepcopy(model), _data(rows=24), scheme=scheme, algorithm=algorithm, write_back=True
    )
    return float((_logits(quantized, ids) - wanted).square().mean())


def _inputs(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    """What the linear ``name`` reads, fp32 [tokens, K]."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    _logits(model, ids)
    hook.remove()
    return seen[0].float()


def test_a_calibration_beats_rounding(llama) -> None:
    plain = _damage(llama, "rtn")
    assert _damage(llama, "clip") < plain
    for algorithm in ("gptq", "awq", "awq+gptq"):
        assert _damage(llama, algorithm) < 0.8 * plain, algorithm


def test_later_blocks_see_what_quantized_ones_give(llama, monkeypatch) -> None:
    seen: dict[str, Tensor] = {}
    solve = quantize._solve

    def spy(linears, moments, algorithm):  # type: ignore[no-untyped-def]
        seen[linears[0].name] = moments.amplitude()
        return solve(linears, moments, algorithm)

    monkeypatch.setattr(quantize, "_solve", spy)
    result = qpass.quantize(copy.deepcopy(llama), _data(), scheme="w2a16-g32", write_back=True)
    name = "model.layers.1.self_attn.q_proj"
    quantized, original = (_inputs(model, name, _data()).abs().mean(0) for model in (result, llama))
    assert torch.allclose(seen[name], quantized, rtol=1e-3)
    assert not torch.allclose(seen[name], original, rtol=1e-2)


def test_targets_are_what_the_original_model_computes(llama, monkeypatch) -> None:
    drifts: dict[str, Tensor | None] = {}
    solve = quantize._solve

    def spy(linears, moments, algorithm):  # type: ignore[no-untyped-def]
        drifts[linears[0].name] = moments.drift()
        return solve(linears, moments, algorithm)

    monkeypatch.setattr(quantize, "_solve", spy)
    result = qpass.quantize(copy.deepcopy(llama), _data(), scheme="w2a16-g32", write_back=True)
    first = drifts["model.layers.0.self_attn.q_proj"]
    assert not bool(first.any())  # nothing before it is quantized
    assert bool(drifts["model.layers.0.self_attn.o_proj"].any())
    name = "model.layers.1.self_attn.q_proj"
    actual, original = _inputs(result, name, _data()), _inputs(llama, name, _data())
    expected = (original - actual).t() @ actual / len(actual)
    assert torch.allclose(drifts[name], expected, atol=1e-4 * float(expected.abs().max()))


def test_targets_of_the_original_model_keep_it_nearer(llama, monkeypatch) -> None:
    with_targets = _damage(llama, "gptq", "w2a16-g32")
    monkeypatch.setattr(quantize, "aligned", lambda weight, drift, shared, share: weight)
    assert with_targets < 0.97 * _damage(llama, "gptq", "w2a16-g32")


def test_siblings_share_moments_and_padding_counts_for_nothing(llama, monkeypatch) -> None:
    groups: list[tuple[list[str], int]] = []
    solve = quantize._solve
    monkeypatch.setattr(
        quantize,
        "_solve",
        lambda linears, moments, algorithm: (
            groups.append(([x.name.rpartition(".")[2] for x in linears], moments.rows))
            or solve(linears, moments, algorithm)
        ),
    )
    mask = torch.ones(6, 40, dtype=torch.long)
    mask[:, 30:] = 0
    qpass.quantize(llama, [{"input_ids": _data(), "attention_mask": mask}], scheme=SCHEME)
    names = [tuple(names) for names, _ in groups[:4]]
    assert names == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert {rows for _, rows in groups} == {180}


def _compiled_values(model: nn.Module, ids: Tensor, scheme: str = "w8a16") -> tuple[Tensor, object]:
    """What the graph of the numbers' passes computes, with real codes; and that graph."""
    captured = capture(lambda x: model(input_ids=x, use_cache=False).logits, ids)
    gm, _ = run_passes(
        captured.gm, context(captured, scheme), [canonicalize, merge_siblings, fold_smoothing, quantize_linears]
    )
    return captured.run(gm)[0], gm


@pytest.mark.parametrize(("family", "algorithm"), [("llama", "awq+gptq"), ("gpt2", "gptq")])
def test_the_compiled_graph_uses_the_codes(family: str, algorithm: str) -> None:
    model = tiny_models.build(family, torch.float32)
    wanted = qpass.quantize(copy.deepcopy(model), _data(), scheme="w3a16-g32", algorithm=algorithm, write_back=True)
    qpass.quantize(model, _data(), scheme="w3a16-g32", algorithm=algorithm)
    ids = _data(seed=5, rows=1, length=12)
    got, _ = _compiled_values(model, ids)
    error = (got - _logits(wanted, ids)).square().mean() / (got - _logits(model, ids)).square().mean()
    assert float(error) < 1e-3


def test_siblings_of_another_format_are_not_merged(llama) -> None:
    schemes = {"*.q_proj": "w4a16-g32", "*.k_proj": "w3a16-g16", "*.v_proj": "w4a16-g32", "*": "w4a16-g64"}
    wanted = qpass.quantize(copy.deepcopy(llama), _data(), scheme=schemes, algorithm="awq", write_back=True)
    qpass.quantize(llama, _data(), scheme=schemes, algorithm="awq")
    ids = _data(seed=5, rows=1, length=12)
    got, gm = _compiled_values(llama, ids)
    sites = [
        node.meta["qpass_names"] for node in gm.graph.nodes if "qpass_names" in node.meta and "quantized" in node.name
    ]
    leaves = [tuple(name.rpartition(".")[2] for name in names) for names in sites]
    assert ("q_proj", "v_proj") in leaves
    assert ("k_proj",) in leaves
    assert ("gate_proj", "up_proj") in leaves  # one format, one divisor: merged
    assert torch.allclose(got, _logits(wanted, ids), atol=2e-3 * float(got.abs().max()))


def test_work_goes_on_behind_the_last_finished_block(llama, tmp_path, monkeypatch) -> None:
    whole = {
        n: given_of(m.weight).read() for n, m in _quantized(copy.deepcopy(llama)).named_modules() if _is_inside(n, m)
    }
    original, done = quantize._quantize_block, []

    def failing(blocks, index, *rest):  # type: ignore[no-untyped-def]
        done.append(index)
        if index == 1 and done.count(1) == 1:
            raise KeyboardInterrupt
        return original(blocks, index, *rest)

    monkeypatch.setattr(quantize, "_quantize_block", failing)
    values = {name: p.clone() for name, p in llama.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        _quantized(llama, folder=tmp_path)
    assert all(torch.equal(p, values[name]) for name, p in llama.named_parameters())
    _quantized(llama, folder=tmp_path)
    assert done == [0, 1, 1]
    for name, module in llama.named_modules():
        if _is_inside(name, module):
            assert torch.equal(given_of(module.weight).read().codes, whole[name].codes), name
    _quantized(llama, folder=tmp_path)
    assert done == [0, 1, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["block-0000.safetensors", "block-0001.safetensors"]


def _quantized(model: nn.Module, **more):  # type: ignore[no-untyped-def]
    return qpass.quantize(model, _data(), **{"scheme": SCHEME, "algorithm": "awq"} | more)


def _is_inside(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and "layers" in name


def test_a_folder_belongs_to_one_model_and_setting(llama, tmp_path) -> None:
    _quantized(llama, folder=tmp_path)
    with pytest.raises(OptionError, match="another model, calibration or setting"):
        _quantized(llama, folder=tmp_path, scheme="w3a16-g32")
    with pytest.raises(OptionError, match="another model"):
        qpass.quantize(llama, _data(seed=3), scheme=SCHEME, algorithm="awq", folder=tmp_path)
    with torch.no_grad():
        next(llama.parameters()).mul_(1.5)
    with pytest.raises(OptionError, match="another model"):
        _quantized(llama, folder=tmp_path)


def test_a_damaged_file_is_named(llama, tmp_path) -> None:
    _quantized(llama, folder=tmp_path)
    file = tmp_path / "block-0001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"block-0001\.safetensors is damaged"):
        _quantized(llama, folder=tmp_path)
    file.write_bytes(whole)
    tensors = load_file(file)
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    name = next(n for n in tensors if n.endswith("codes"))
    save_file(tensors | {name: tensors[name][:-1].clone()}, file, metadata=metadata)
    with pytest.raises(CheckpointError, match="is damaged"):
        _quantized(llama, folder=tmp_path)


def test_a_plain_module_is_one_block() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).requires_grad_(False)
    mixed = torch.randn(16, 64)
    data = [torch.randn(32, 16) @ mixed for _ in range(8)]
    x = torch.randn(64, 16) @ mixed
    losses = [
        float(
            (qpass.quantize(copy.deepcopy(net), data, scheme=SCHEME, algorithm=a, write_back=True)(x) - net(x))
            .square()
            .mean()
        )
        for a in ("gptq", "rtn")
    ]
    assert losses[0] < 0.5 * losses[1]


def test_weights_without_data_are_found_when_they_are_packed(llama) -> None:
    qpass.quantize(llama, algorithm="clip", scheme="w3a16-g32", exclude="*.down_proj")
    layer = llama.model.layers[0]
    given = given_of(layer.mlp.up_proj.weight)
    assert given is not None
    assert given_of(layer.mlp.down_proj.weight) is None
    weight = layer.mlp.up_proj.weight
    weight = weight.detach()
    errors = [float((q.dequantize() - weight).square().sum()) for q in (given.read(), rtn(weight, Format(3, 32)))]
    assert errors[0] < errors[1]


def test_speculation_over_gptq_codes_changes_no_token() -> None:
    torch._dynamo.reset()
    model = first_layers(copy.deepcopy(tiny_decoders.build("qwen2")), 1).bfloat16()
    ids = torch.randint(3, tiny_decoders.VOCAB, (8, 48), generator=torch.Generator().manual_seed(0))
    qpass.quantize(model, ids, scheme="w4a8-g16", algorithm="awq+gptq")
    step = Decoder(model, lambda function: qpass.compile(function, scheme="w4a8-g16", fullgraph=True, dynamic=False))
    prompts = [tiny_decoders.prompt(n, seed=n) for n in (9, 3)]
    plain = [Speculator(step).generate(p, max_new_tokens=32).new_tokens[0] for p in prompts]
    assert len(set(plain[0])) > 5
    texts = [p[0].tolist() + new for p, new in zip(prompts, plain, strict=True)]
    drafted = Speculator(step, Oracle(texts, [], wrong=lambda place: place % 5 == 0), k=4)
    for prompt, new in zip(prompts, plain, strict=True):
        assert drafted.generate(prompt, max_new_tokens=32).new_tokens[0] == new
        assert drafted.stats.acceptance > 0.5
    records = qpass.explain(step.likely_step).records
    assert any(note.startswith("codes from awq+gptq") for record in records for note in record.notes)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"algorithm": "magic"}, OptionError, "unknown algorithm 'magic'; accepted: gptq, awq"),
        ({"scheme": "w5a16"}, SchemeError, "unknown scheme"),
        ({"scheme": "w16a16"}, OptionError, "no linear layer to quantize"),
        ({"exclude": "nothing.*"}, OptionError, "matches none of the linear layers"),
        ({"batches": None}, OptionError, "text needs a tokenizer"),
        ({"batches": []}, OptionError, "the calibration set is empty"),
        ({"batches": torch.ones(1, 8, dtype=torch.long)}, OptionError, "has 8 tokens; at least 128"),
        ({"batches": torch.rand(4, 64)}, OptionError, "must hold token ids"),
    ],
)
def test_bad_requests(llama, options, error, says) -> None:
    arguments = {"batches": _data(), "scheme": SCHEME} | options
    with pytest.raises(error, match=says):
        qpass.quantize(llama, arguments.pop("batches"), **arguments)
    assert all(given_of(p) is None for p in llama.parameters())


def test_bad_weights_are_named(llama) -> None:
    name = "model.layers.1.mlp.up_proj"
    weight = llama.get_submodule(name).weight
    with torch.no_grad():
        kept, weight[0, 0] = float(weight[0, 0]), float("nan")
    with pytest.raises(OptionError, match=f"{name}: its weight holds NaN"):
        _quantized(llama)
    with torch.no_grad():
        weight[0, 0] = kept
        norm = llama.model.layers[1].input_layernorm.weight
        held, norm[0] = float(norm[0]), float("inf")
    with pytest.raises(OptionError, match="the model's own output holds NaN"):
        _quantized(llama)
    with torch.no_grad():
        norm[0] = held
    release(weight, name)
    with pytest.raises(OptionError, match=f"{name}: its full-precision data was released"):
        _quantized(llama)
    with pytest.raises(OptionError, match=r"takes an nn\.Module, not str"):
        qpass.quantize("model")


def test_codes_of_other_values_are_refused(llama, tmp_path) -> None:
    qpass.quantize(llama, _data(), scheme=SCHEME)
    llama.get_parameter("model.layers.1.mlp.down_proj.weight").data += 0.01
    with pytest.raises(OptionError, match=r"down_proj.weight: its values changed since gptq found codes"):
        save(llama, tmp_path / "smaller")
    with torch.no_grad(), pytest.raises(Exception, match="values changed since gptq found codes"):
        qpass.compile(llama)(_data(rows=1))
