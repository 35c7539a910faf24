"""qpass.speculate at its doors: transformers' names, streamers, stop strings, decorators, pairs that can't work, the command."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import qpass
from qpass.errors import OptionError, UnsupportedError
from qpass.frontends.cli import app
from qpass.scheme import HEAD_SCHEME

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
import tiny_decoders

NEW = 24
SCHEME = "w8a8-dynamic"


@pytest.fixture(scope="module")
def model():
    return copy.deepcopy(tiny_decoders.build("qwen2")).bfloat16()


@pytest.fixture(scope="module")
def plain(model):
    return qpass.speculate(model, None, scheme=SCHEME)


@pytest.fixture(scope="module")
def spec(model):
    return qpass.speculate(model, "layers:1", k=3, scheme=SCHEME)


def _generate(spec, ids, **options):
    return spec.generate(
        ids, attention_mask=torch.ones_like(ids), **{"max_new_tokens": NEW, "do_sample": False} | options
    )


def test_generate_takes_transformers_names(spec, plain, model):
    ids = tiny_decoders.prompt(7)
    wanted = _generate(plain, ids)
    assert wanted.shape == (1, 7 + NEW)
    assert torch.equal(_generate(spec, ids), wanted)
    config = transformers.GenerationConfig(max_length=20, do_sample=False, pad_token_id=0)
    assert torch.equal(spec.generate(ids, generation_config=config), wanted[:, :20])
    out = _generate(spec, ids, return_dict_in_generate=True)
    assert torch.equal(out.sequences, wanted)
    assert torch.equal(
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, custom_generate=spec
        ),
        wanted,
    )
    assert spec.stats.new_tokens == NEW
    assert "tokens/s" in str(spec.stats)


def test_processors_of_transformers_are_the_same_for_both(spec, plain):
    ids = tiny_decoders.prompt(7)
    for options in (
        {"repetition_penalty": 1.6},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 10, "eos_token_id": int(_generate(plain, ids)[0, 9])},
        {"bad_words_ids": [[int(_generate(plain, ids)[0, 8])]]},
    ):
        wanted = _generate(plain, ids, **options)
        assert not torch.equal(wanted, _generate(plain, ids)), options
        assert torch.equal(_generate(spec, ids, **options), wanted), options


def test_sampling_follows_the_seed(spec):
    ids = tiny_decoders.prompt(7)
    options = {"do_sample": True, "temperature": 1.2, "top_k": 30, "top_p": 0.9}

    def draw(seed):
        torch.manual_seed(seed)
        return _generate(spec, ids, **options)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_a_streamer_gets_prompt_and_tokens(spec, plain):
    class Seen(transformers.generation.BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], 0

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.ended += 1

    ids, streamer = tiny_decoders.prompt(7), Seen()
    out = _generate(spec, ids, streamer=streamer)
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended == 1
    with pytest.raises(OptionError, match="a streamer takes one row"):
        _generate(spec, ids.repeat(2, 1), streamer=Seen())


def test_criteria_end_a_row_inside_of_a_draft(spec, plain):
    ids = tiny_decoders.prompt(7)
    wanted = _generate(plain, ids)[0].tolist()

    class At(transformers.StoppingCriteria):
        def __call__(self, tokens, scores, **kwargs):
            return torch.tensor([tokens.shape[1] == 13])

    out = _generate(spec, ids, stopping_criteria=transformers.StoppingCriteriaList([At()]))
    assert out[0].tolist() == wanted[:13]


def test_stop_strings(checkpoint):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    spec = qpass.speculate(model, "ngram", k=4, scheme=SCHEME)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    free = _generate(spec, ids, eos_token_id=None)
    text = tokenizer.decode(free[0, ids.shape[1] :])
    stop = next(
        text[i : i + 2]
        for i in range(4, len(text))
        if text[i].isascii() and text[i].isprintable() and text.index(text[i]) == i
    )
    out = _generate(spec, ids, eos_token_id=None, stop_strings=stop, tokenizer=tokenizer)
    config = transformers.GenerationConfig(stop_strings=stop, max_new_tokens=NEW, do_sample=False, pad_token_id=1)
    assert torch.equal(spec.generate(ids, generation_config=config, tokenizer=tokenizer, eos_token_id=None), out)
    cut = tokenizer.decode(out[0, ids.shape[1] :])
    assert cut == text[: len(cut)]
    assert stop in cut
    assert stop not in cut[:-1]
    with pytest.raises(OptionError, match="stop_strings need tokenizer="):
        _generate(spec, ids, stop_strings="x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "greedily or by sampling, not by beam search"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores: speculation keeps no scores"),
        ({"guidance_scale": 1.5}, "guidance_scale runs the model a second time"),
    ],
)
def test_what_speculation_cannot_do(spec, options, message):
    with pytest.raises(OptionError, match=message):
        _generate(spec, tiny_decoders.prompt(5), **options)


def test_another_model_is_refused(spec):
    other = copy.deepcopy(tiny_decoders.build("qwen2")).bfloat16()
    with pytest.raises(OptionError, match="made for another Qwen2ForCausalLM"):
        other.generate(tiny_decoders.prompt(5), max_new_tokens=3, custom_generate=spec)


def test_a_compiled_model_keeps_its_scheme(model, plain):
    fast = qpass.compile(model, scheme=SCHEME)
    spec = qpass.speculate(fast, "ngram", k=3)
    ids = tiny_decoders.prompt(7)
    assert torch.equal(_generate(spec, ids), _generate(plain, ids))
    assert {r.scheme for r in spec.explain().records} == {SCHEME, HEAD_SCHEME}
    with pytest.raises(OptionError, match="scheme was chosen when the model was compiled"):
        qpass.speculate(fast, scheme="w8a16")


def test_near_ties_are_told_beforehand(model):
    spec = qpass.speculate(model, "ngram", k=2, scheme="w16a16")
    with pytest.warns(UserWarning, match="speculation may choose the other one"):
        _generate(spec, tiny_decoders.prompt(5), max_new_tokens=2)


def test_decorators(plain):
    ids = tiny_decoders.prompt(7)
    wanted = _generate(plain, ids)

    @qpass.speculate(draft="layers:1", k=3, scheme=SCHEME)
    class Fast(transformers.Qwen2ForCausalLM):
        pass

    torch.manual_seed(0)
    fast = Fast(tiny_decoders.CONFIGS["qwen2"]()).eval().requires_grad_(False)
    fast.load_state_dict(tiny_decoders.build("qwen2").state_dict())
    fast = fast.bfloat16()
    fast.generation_config.eos_token_id, fast.generation_config.pad_token_id = None, 0
    assert torch.equal(fast.generate(ids, max_new_tokens=NEW, do_sample=False), wanted)
    assert fast.speculation.stats.rounds

    @qpass.speculate(draft=None, scheme=SCHEME)
    def make():
        return plain.decoder.model

    assert torch.equal(_generate(make(), ids), wanted)


def _of(vocabulary):
    config = tiny_decoders.CONFIGS["llama"]()
    config.vocab_size = vocabulary
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("draft", "error", "message"),
    [
        (lambda: _of(50), OptionError, "vocabulary of 50 tokens and the target one of 97; give tokenizer="),
        (lambda: "layers:many", OptionError, "accepted: layers:N"),
        (lambda: "layers:2", OptionError, "the target has 2 layers; accepted: 1 to 1"),
        (lambda: 7, OptionError, "draft is 7; accepted: a model"),
        (lambda: "no/such/folder/here", OptionError, "no/such/folder/here"),
        (lambda: torch.nn.Linear(2, 2), UnsupportedError, "the draft: Linear is not a transformers model"),
    ],
)
def test_pairs_that_cannot_work(model, draft, error, message):
    with pytest.raises(error, match=message):
        qpass.speculate(model, draft(), scheme=SCHEME)


def test_the_target_as_its_own_draft(model):
    with pytest.raises(OptionError, match="the draft is the target itself"):
        qpass.speculate(model, model)


def test_speculate_takes_models():
    with pytest.raises(OptionError, match=r"qpass\.speculate takes a model"):
        qpass.speculate(3)


def test_run_with_a_draft_and_a_trace(checkpoint, tmp_path):
    runner, page = CliRunner(), tmp_path / "trace.html"
    arguments = ["run", str(checkpoint), "-p", "hello", "--scheme", SCHEME, "--max-new-tokens", "20"]
    plain = runner.invoke(app, arguments)
    assert plain.exit_code == 0, plain.stderr
    drafted = runner.invoke(app, [*arguments, "--draft", "ngram,layers:1", "--k", "3", "--trace", str(page)])
    assert drafted.exit_code == 0, drafted.stderr
    assert drafted.stdout == plain.stdout
    assert "tokens a step" in drafted.stderr
    assert "hello" in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft", "layers:x"], "accepted: layers:N"),
        (["--draft", "ngram", "--k", "99"], "k is 99; accepted: 'auto' or a whole number from 0 to 15"),
        (["--draft", "ngram", "--k", "some"], "k is 'some'; accepted: 'auto'"),
        (["--trace", "trace.txt"], "accepted is a file .html"),
        (["--trace", "no/such/folder/trace.html"], "in a folder that exists"),
    ],
)
def test_wrong_options_of_run(checkpoint, options, message):
    result = CliRunner().invoke(app, ["run", str(checkpoint), "-p", "hello", *options])
    assert result.exit_code != 0
    assert message in " ".join(result.stderr.split())
