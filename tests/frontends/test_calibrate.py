"""calibrate: what linears read, bounded and resumable; the file of statistics; what comes of both in a compiled model."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import qpass
from qpass.algorithms.observe import BINS, EXTREMES, SAMPLE, Observer
from qpass.errors import CheckpointError, OptionError, QpassError, UnsupportedError
from qpass.frontends.calibrate import calibrate
from qpass.frontends.instrument import instrument
from qpass.frontends.options import Options
from qpass.frontends.simulate import Simulation, divergence
from qpass.frontends.statistics import Statistics
from qpass.scheme import Scheme
from tests.support.capture import Body
from tests.support.tiny_models import VOCABULARY, build


def ids(count=8, length=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (1, length), generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def llama():
    return build("llama", torch.float32)


@pytest.fixture(scope="module")
def stats(llama):
    return calibrate(llama, ids(), hessian=True)


def test_every_linear_is_seen_as_the_passes_see_it(llama, stats):
    linears = {name: tuple(m.weight.shape) for name, m in llama.named_modules() if isinstance(m, nn.Linear)}
    assert stats.linears == linears
    assert stats.tokens == 8 * 40
    attention = "model.layers.0.self_attn."
    assert stats.of(attention + "q_proj") is stats.of(attention + "v_proj")
    assert stats.of(attention + "q_proj") is not stats.of(attention + "o_proj")


def test_the_numbers_are_those_of_a_hook(llama, stats):
    seen, module = [], llama.model.layers[1].mlp.down_proj
    hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for batch in ids():
            llama(input_ids=batch, use_cache=False)
    hook.remove()
    x, found = torch.cat(seen), stats.of("model.layers.1.mlp.down_proj")
    for seen_end, end in ((found.low, x.amin(0)), (found.high, x.amax(0)), (found.absmax, x.abs().amax(0))):
        assert torch.allclose(seen_end, end, rtol=1e-4, atol=1e-6)
    assert torch.allclose(found.hessian_diagonal, 2 * x.square().mean(0), rtol=1e-3)
    for share in (0.5, 0.99):
        assert found.percentile(share) == pytest.approx(
            x.abs().flatten().quantile(share).item(), abs=2 * found.limit / BINS
        )


def test_memory_is_bounded_and_extremes_are_kept():
    observer = Observer(4, torch.float32)
    for seed in range(20):
        x = torch.randn(300, 4, generator=torch.Generator().manual_seed(seed))
        if seed == 11:
            x[5] = 100.0
        observer.see(x)
    assert observer.sample.shape == (SAMPLE, 4)
    assert observer.extremes.shape == (EXTREMES, 4)
    assert observer.extremes.max() == 100.0
    assert int(observer.histogram.sum()) == 20 * 300 * 4
    rows, counts = observer.weighted_rows()
    assert len(rows) == SAMPLE + EXTREMES
    assert counts.sum() == pytest.approx(6000)


def test_a_clip_is_the_least_squared_error():
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 40.0
    observer = Observer(8, torch.float32)
    observer.see(x)

    def error(clip):
        scale = clip / 127
        return float(((x / scale).round().clamp(-127, 127) * scale - x).double().square().sum())

    best = min((error(c), c) for c in torch.linspace(1, 40, 400).tolist())
    assert error(observer.clip()) < 1.02 * best[0]


def test_a_file_says_the_same(stats, tmp_path):
    stats.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    assert (again.linears, again.fingerprint, again.batches) == (stats.linears, stats.fingerprint, stats.batches)
    for names, observer in stats.inputs.items():
        for part in ("low", "high", "histogram", "sample", "extremes", "squares"):
            assert torch.equal(getattr(again.inputs[names], part), getattr(observer, part))
        assert again.inputs[names].clip() == observer.clip()
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_an_interrupted_run_goes_on(llama, stats, tmp_path):
    batches, path = ids(), tmp_path / "part"

    def broken():
        yield from batches
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, broken(), hessian=True, resume=path, settings="same")
    assert Statistics.load(path).batches == 8
    with pytest.raises(OptionError, match="begun with other batches"):
        calibrate(llama, batches, hessian=True, resume=path, settings="other")
    ran = []
    hook = llama.register_forward_pre_hook(lambda m, args: ran.append(1))
    whole = calibrate(llama, batches, hessian=True, resume=path, settings="same")
    hook.remove()
    assert not ran
    assert not path.exists()
    for names, observer in stats.inputs.items():
        assert torch.equal(whole.inputs[names].sample, observer.sample)
        assert torch.equal(whole.inputs[names].squares, observer.squares)


@pytest.mark.parametrize("part", ["low", "sample", "peaks"])
def test_damaged_files_are_refused(stats, tmp_path, part):
    path = tmp_path / "s.safetensors"
    stats.save(path)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = f"0.{part}"
    for bad in (
        tensors[name][..., :-1].contiguous(),
        tensors[name].double(),
        torch.full_like(tensors[name], torch.nan),
    ):
        save_file(tensors | {name: bad}, path, metadata)
        with pytest.raises(CheckpointError, match="damaged file of statistics"):
            Statistics.load(path)
    save_file(tensors | {"0.low": tensors["0.high"] + 1}, path, metadata)
    with pytest.raises(CheckpointError, match="low is above 0"):
        Statistics.load(path)
    save_file(tensors, path, metadata | {"linears": json.dumps({"x": [1, 2]})})
    with pytest.raises(CheckpointError, match="damaged"):
        Statistics.load(path)
    save_file(tensors, path, {})
    with pytest.raises(CheckpointError, match="not a file of statistics"):
        Statistics.load(path)
    path.write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Statistics.load(path)
    with pytest.raises(OptionError, match="does not exist"):
        Statistics.load(tmp_path / "none")


def test_bad_sets_are_refused(llama):
    with pytest.raises(OptionError, match="empty"):
        calibrate(llama, [])
    with pytest.raises(OptionError, match="has 40 tokens; at least 128"):
        calibrate(llama, ids(1))
    with pytest.raises(OptionError, match="needs a tokenizer"):
        calibrate(llama, None)
    with pytest.raises(OptionError, match="is on meta"):
        calibrate(llama, [torch.zeros(1, 4, dtype=torch.int64, device="meta")])
    with pytest.raises(UnsupportedError, match="a batch is on meta"):
        calibrate(nn.Sequential(nn.Linear(4, 4)).eval(), [torch.zeros(1, 4, device="meta")])
    with pytest.raises(UnsupportedError, match="training mode"):
        calibrate(nn.Sequential(nn.Linear(4, 4)), [torch.zeros(1, 4)])
    with pytest.raises(OptionError, match="no linear layer"):
        calibrate(nn.Sequential(nn.ReLU()).eval(), [torch.zeros(1, 4)])


def test_a_model_that_torch_stops_compiling_is_an_error_not_an_eager_run():
    model = Body(lambda m, x: m.fc(x) * m.factor, fc=nn.Linear(4, 4)).eval()
    model.factor = 0
    run = instrument(model, limit=2)
    run(torch.zeros(1, 4))

    def run_with_ever_new_constants():
        for model.factor in (1, 2.5, 3, 4):
            run(torch.zeros(1, 4))

    with pytest.raises(QpassError, match="Body ran without its graphs"):
        run_with_ever_new_constants()


def test_nan_names_the_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[0].bias[1] = torch.nan
    with pytest.raises(QpassError, match="the input of 1 holds NaN or infinity in batch 0"):
        calibrate(model, [torch.zeros(200, 4)])


def test_statistics_of_another_model_are_refused_by_name(stats):
    other = build("gpt2", torch.float32)
    with pytest.raises(OptionError, match=r"of another model: they know a linear 'model.layers.0"):
        qpass.compile(other, scheme="w8a8-dynamic", stats=stats)
    narrow = build("llama_awkward", torch.float32)
    with pytest.raises(OptionError, match=r"has it with \["):
        qpass.compile(narrow, scheme="w8a8-dynamic", stats=stats)


@pytest.mark.parametrize("scheme", ["w8a8-static", {"model.*": "w8a8-static"}, "w8a8-outlier"])
def test_a_scheme_that_needs_statistics_says_so_before_any_work(llama, scheme):
    with pytest.raises(OptionError, match=r"needs statistics.*qpass\.calibrate"):
        qpass.compile(llama, scheme=scheme)


@pytest.mark.parametrize("alpha", [1.5, -0.1, "much", True, {"a": 2}, {1: 0.5}])
def test_bad_alphas_are_refused(stats, alpha):
    with pytest.raises(OptionError, match="alpha"):
        Options.make(scheme="w8a8-dynamic", stats=stats, alpha=alpha)


def test_alpha_needs_statistics_and_may_differ_by_layer(stats):
    with pytest.raises(OptionError, match="pass stats="):
        Options.make(alpha=0.5)
    chosen = Options.make(stats=stats, alpha={"model.layers.0.*": None, "*": 0.7}).calibrated
    assert chosen.alpha_of("model.layers.0.mlp.up_proj") is None
    assert chosen.alpha_of("model.layers.1.mlp.up_proj") == 0.7
    assert chosen is Options.make(stats=stats, alpha={"model.layers.0.*": None, "*": 0.7}).calibrated
    with pytest.raises(OptionError, match="stats takes"):
        Options.make(stats=3)


def test_static_end_to_end_on_the_reference_lowering(llama, stats, tmp_path):
    """Through Dynamo and Inductor once, from a file, the names of the graph meeting those of calibration."""
    stats.save(tmp_path / "s.safetensors")
    layer = Body(lambda m, x: m.down(m.up(x).relu()), up=nn.Linear(64, 96), down=nn.Linear(96, 8)).eval()
    x = [torch.randn(64, 64, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    for batch in x:
        batch[:, 5] *= 40
    own = calibrate(layer, x)
    fast = qpass.compile(layer, scheme="w8a8-static", stats=own, lowering="reference")
    with torch.no_grad():
        exact, found = layer(x[0]), fast(x[0])
    assert (found - exact).norm() < 0.02 * exact.norm()
    explanation = qpass.explain(fast)
    assert {record.scheme for record in explanation.records} == {"w8a8-static"}
    assert any("smoothed" in record.fused for record in explanation.records)
    assert explanation.graphs[0].counts["fold_smoothing"] >= 1


def test_planted_outliers_are_what_smoothing_is_for(llama):
    """A few channels of each norm's output fifty times larger, their columns as much smaller: the same function."""
    model = copy.deepcopy(llama)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
            ):
                norm.weight[[3, 40]] *= 50
                for reader in readers:
                    reader.weight[:, [3, 40]] /= 50
    batches = ids()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    planted = calibrate(model, batches)

    def kl(model, scheme, calibrated=None):
        simulation = Simulation(model, calibrated)
        reference = simulation(batches[0]).logits
        simulation.schemes = dict.fromkeys(names, Scheme.parse(scheme))
        return divergence(reference, simulation(batches[0]).logits)

    clean, plain = kl(llama, "w8a8-dynamic"), kl(model, "w8a8-dynamic")
    assert plain > 5 * clean
    for alpha in ("auto", 0.5):
        assert kl(model, "w8a8-dynamic", planted.calibrated(alpha)) < 2 * clean
    assert kl(model, "w8a8-static", planted.calibrated("auto")) < plain
    assert kl(model, "w8a8-outlier", planted.calibrated(None)) < 2 * clean
