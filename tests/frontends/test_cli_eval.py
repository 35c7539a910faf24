"""qpass eval: the numbers of the loops in qpass.measure, through compiled passes, kept and not measured twice."""

import pytest
import torch
from typer.testing import CliRunner

from qpass.frontends import backend, hf, speculation
from qpass.frontends.cli import app
from qpass.frontends.commands import eval_tasks
from qpass.frontends.commands.eval_asked import Asked, matches
from qpass.measure import humaneval, record
from qpass.measure.perplexity import perplexity
from qpass.runtime.decoder import Decoder
from qpass.runtime.speculate import Speculator

TEXT = "def f(x):\n    return x\n" * 12


def _qpass(*arguments):
    return CliRunner().invoke(app, ["eval", *(str(a) for a in arguments)])


def test_text_quality_through_the_passes_is_kept_and_not_measured_twice(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "compile_fx", lambda gm, inputs, **options: gm.forward)  # the passes are real
    text, output = tmp_path / "text.py", tmp_path / "out.jsonl"
    text.write_text(TEXT)
    arguments = (checkpoint, "--scheme", "bf16,w2a16-g32", "--text", text, "--length", 32, "--stride", 16, "-o", output)
    out = _qpass(*arguments)
    assert out.exit_code == 0, out.output
    found = {(r.settings["scheme"], r.what): r for r in record.read(output)}
    assert set(found) == {("bf16", "perplexity")} | {
        ("w2a16-g32", what) for what in ("perplexity", "kl", "kl_p99", "top1_agreement")
    }
    loaded = hf.load(checkpoint)
    ids = loaded.tokenizer(TEXT, return_tensors="pt").input_ids[0]
    (plain,) = perplexity(lambda x: loaded.model(x).logits, ids, length=32, stride=16)
    full, two = found["bf16", "perplexity"], found["w2a16-g32", "perplexity"]
    assert full.value == pytest.approx(plain.value, rel=1e-3)
    assert full.n == two.n == len(ids) - 1
    assert two.value != pytest.approx(full.value, rel=1e-3)  # two bits of a random model: it is another one
    assert found["w2a16-g32", "kl"].value > 0.01
    assert two.settings["linear_bytes"] < two.settings["linear_bytes_before"] / 3
    for word in ("bf16", "w2a16-g32", "KL, nats", f"{two.value:.3f}"):
        assert word in out.stdout
    before = output.read_bytes()
    monkeypatch.setattr(eval_tasks, "compiled", None)  # would fail if anything were measured again
    again = _qpass(*arguments)
    assert again.exit_code == 0, again.output
    assert again.stdout == out.stdout
    assert output.read_bytes() == before


def test_a_result_of_other_choices_is_another_result():
    plain = {"model": "m", "scheme": "w8a8-dynamic", "tokens": 5}
    assert matches(plain | {"linear_bytes": 7}, plain)
    assert not matches(plain | {"stats": "s 1"}, plain)
    assert not matches(plain, plain | {"stats": "s 1"})
    assert not matches(plain, plain | {"tokens": 6})


class _Eager:
    """qpass.speculate without compilation."""

    def __init__(self, model, draft, **_):
        self.decoder = Decoder(model)
        self.speculator = Speculator(self.decoder)

    def warm_up(self, batch):
        return 0.0


def test_humaneval_is_answered_run_and_kept(checkpoint, tmp_path, monkeypatch):
    tasks = {
        f"T/{i}": {
            "task_id": f"T/{i}",
            "prompt": f'def f{i}():\n    """."""\n',
            "entry_point": f"f{i}",
            "test": "def check(g):\n    assert True\n" if i else "def check(g):\n    assert g() == 1\n",
        }
        for i in range(3)
    }
    monkeypatch.setattr(humaneval, "problems", lambda count: dict(list(tasks.items())[:count]))
    monkeypatch.setattr(speculation, "Speculation", _Eager)
    output = tmp_path / "out.jsonl"
    arguments = (
        checkpoint,
        "--scheme",
        "bf16",
        "--tasks",
        "humaneval",
        "--no-chat",
        "--batch",
        2,
        "--max-new-tokens",
        9,
        "-o",
        output,
    )
    out = _qpass(*arguments, "--problems", 3)
    assert out.exit_code == 0, out.output
    (found,) = record.read(output)
    assert (found.n, found.settings["chat"], found.settings["unfinished"]) == (3, False, 3)
    assert "HumanEval pass@1" in out.stdout
    samples = (tmp_path / "out.samples.jsonl").read_text().splitlines()
    assert len(samples) == 3
    assert _qpass(*arguments, "--problems", 3).stdout == out.stdout
    assert (tmp_path / "out.samples.jsonl").read_text().splitlines() == samples


def test_quantized_weights_are_not_compared_with_themselves(checkpoint, tmp_path):
    from qpass import load, save

    save(load(checkpoint, scheme="w4a16-g32"), tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "small" / name).write_bytes((checkpoint / name).read_bytes())
    text = tmp_path / "text.py"
    text.write_text(TEXT)
    out = _qpass(tmp_path / "small", "--text", text)
    assert out.exit_code == 2, out.output
    assert "is quantized already: give its full-precision model with --reference" in " ".join(out.stderr.split())


def test_a_long_text_is_read_in_parts_of_all_of_it(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a" * 5000 + "b" * 5000)
    asked = Asked(str(checkpoint), ("bf16",), ("perplexity",), text=text, tokens=4096)
    loaded = hf.load(checkpoint)
    ids = eval_tasks.text_tokens(asked, loaded)
    assert len(ids) == 4096
    assert set(loaded.tokenizer.decode(ids)) == {"a", "b"}
    assert torch.equal(eval_tasks.text_tokens(asked, loaded), ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scheme", "w5a3"), "unknown scheme 'w5a3'"),
        (("--tasks", "perplexity,iq"), "unknown task 'iq'; accepted: perplexity, kl, humaneval"),
        (("--scheme", ","), "at least one scheme"),
        (("--text", "/no/such/text"), "neither a text file nor a folder"),
        (("--stride", "600"), "stride is 600; accepted: 1 to 511"),
        (("--stats", "/no/such/file"), "/no/such/file is not a file"),
        (("--recipe", "/no/such/file", "--scheme", "w8a16"), "a recipe says every layer's scheme"),
        (("--scheme", "recipe"), "give --recipe FILE"),
    ],
)
def test_what_is_wrong_is_one_sentence(checkpoint, arguments, message):
    out = _qpass(checkpoint, *arguments)
    assert out.exit_code == 2, out.output
    assert message in " ".join(out.stderr.split())
    assert len(out.stderr.strip().splitlines()) == 1
