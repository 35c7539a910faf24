"""The adapter for lm-evaluation-harness: its own Hugging Face model's numbers, and a task of its command line."""

import json

import pytest

pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from qpass.errors import OptionError
from qpass.frontends import backend
from qpass.frontends.hf import load
from qpass.frontends.lm_eval import QPassLM

PAIRS = [("def f(", "x): return"), ("import", " os"), ("", "print"), ("a" * 60, "bb"), ("x =", " 1\n")]


def _asked(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


@pytest.fixture(autouse=True, scope="module")
def _passes_alone():
    """The rewritten graphs run as they are: what Inductor makes of them is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "compile_fx", lambda gm, inputs, **options: gm.forward)
        yield


@pytest.fixture(scope="module")
def models(checkpoint):
    loaded = load(checkpoint)
    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=2, device="cpu")
    return theirs, QPassLM(str(checkpoint), scheme="w16a16", batch_size=2, draft="ngram")


def test_likelihoods_are_those_of_the_plain_model(models):
    wanted, found = (m.loglikelihood(_asked("loglikelihood", PAIRS), disable_tqdm=True) for m in models)
    for (a, _), (b, _) in zip(wanted, found, strict=True):
        assert b == pytest.approx(a, rel=0.02)
    texts = [("some text that is rolled over " * 6,), ("short",)]
    wanted, found = (m.loglikelihood_rolling(_asked("loglikelihood_rolling", texts), disable_tqdm=True) for m in models)
    assert found == pytest.approx(wanted, rel=0.02)


def test_generation_ends_where_it_is_told_to(models):
    how = {"until": ["\n"], "max_gen_toks": 24, "do_sample": False}
    asked = _asked("generate_until", [("def f(x):", how), ("def", how), ("class A", how)])
    for model in models:
        texts = model.generate_until(asked, disable_tqdm=True)
        assert len(texts) == 3
        assert all("\n" not in text for text in texts)
    (cut,) = models[1].generate_until(_asked("generate_until", [("def f(x):", {"max_gen_toks": 9})]), disable_tqdm=True)
    (longer,) = models[1].generate_until(
        _asked("generate_until", [("def f(x):", {"max_gen_toks": 30})]), disable_tqdm=True
    )
    assert longer.startswith(cut.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert len(longer) > len(cut)
    (stopped,) = models[1].generate_until(
        _asked("generate_until", [("def f(x):", {"max_gen_toks": 30, "until": [longer[4:6]]})]), disable_tqdm=True
    )
    assert stopped == longer[: longer.index(longer[4:6])]
    with pytest.raises(OptionError, match="num_beams"):
        models[1].generate_until(
            _asked("generate_until", [("x", {"num_beams": 4, "max_gen_toks": 4})]), disable_tqdm=True
        )


def test_a_task_runs_by_name(checkpoint, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"q": f"{i} + 1 =", "c": [" x", f" {i + 1}"], "a": 1}) + "\n" for i in range(4)))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc"}],
    }
    out = lm_eval.simple_evaluate(
        model="qpass", model_args=f"pretrained={checkpoint},scheme=w8a16", tasks=[task], batch_size=2, bootstrap_iters=0
    )
    assert 0 <= out["results"]["sums"]["acc,none"] <= 1
    assert out["n-samples"]["sums"]["effective"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"batch_size": "auto"}, "batch_size is 'auto'"), ({"device": "cuda"}, "device is 'cuda'")],
)
def test_what_it_can_not_do_is_told(checkpoint, arguments, message):
    with pytest.raises(OptionError, match=message):
        QPassLM(str(checkpoint), **arguments)
