"""HumanEval: what is asked, what is taken from an answer, resumption, verdicts, and the interval."""

import json

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qpass.errors import OptionError
from qpass.measure import humaneval, humaneval_samples
from qpass.measure.humaneval import completion, cut, judge, problems, records, wilson
from qpass.runtime.decoder import Decoder
from qpass.runtime.ngram import NgramDraft
from qpass.runtime.speculate import Ends, Generation, Speculator

TASK = {
    "task_id": "T/0",
    "prompt": 'def f(x):\n    """Twice x."""\n',
    "entry_point": "f",
    "test": "def check(g):\n    assert g(3) == 6\n",
}


@pytest.fixture(scope="module")
def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = tf.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    made.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    return made


class Scripted:
    """Writes what it is told to, with the real loop's ends; counts the rows that it was asked for."""

    def __init__(self, tokenizer, script, context=4096):
        self.tokenizer, self.script, self.asked, self.prompts = tokenizer, script, 0, []
        self.decoder, self.context = self, context

    def eos(self):
        return frozenset({1})

    def generate(self, ids, mask, *, max_new_tokens, eos_token_id, stop):
        rows = [row[row.shape[0] - int(m.sum()) :].tolist() for row, m in zip(ids, mask, strict=True)]
        self.asked += len(rows)
        ends, new = Ends([len(row) for row in rows], max_new_tokens, frozenset(eos_token_id), stop), []
        for row in rows:
            text = self.tokenizer.decode(row)
            self.prompts.append(text)
            new.append([*self.tokenizer(self.script(text)).input_ids, 1])
        return Generation(ids, ends.append(rows, new), 0.0)


def test_the_published_solutions_pass():
    chosen = problems(16)
    assert len(chosen) == 16
    solved = {name: problem["canonical_solution"] for name, problem in chosen.items()}
    verdicts = judge(chosen, solved)
    assert {name for name, verdict in verdicts.items() if not verdict.passed} == set()
    emptied = judge(chosen, dict.fromkeys(list(chosen)[:4], "    return None\n"))
    assert not any(verdict.passed for verdict in emptied.values())


def test_they_pass_through_the_whole_way(tokenizer, tmp_path):
    """Prompt, tokens, stop, extraction, file, tests: with a model that knows the answers and then goes on."""
    chosen = problems(5)

    def knows(text):
        right = next(p for p in chosen.values() if p["prompt"] == text)
        return right["canonical_solution"] + "\ndef another():\n    pass\n"

    model = Scripted(tokenizer, knows)
    samples = humaneval_samples.generate(model, tokenizer, chosen, tmp_path / "s.jsonl", about={}, batch=2)
    assert all(sample.finished and "another" not in sample.completion for sample in samples.values())
    verdicts = judge(chosen, {name: sample.completion for name, sample in samples.items()})
    assert [verdict.result for verdict in verdicts.values()] == ["passed"] * 5
    (record,) = records(verdicts, {"scheme": "w8a16"})
    assert (record.value, record.n, record.unit) == (100, 5, "%")
    assert record.settings["interval_95"] == [56.55, 100.0]


def test_a_chat_is_asked_and_its_code_is_taken(tokenizer, tmp_path):
    chosen = {"T/0": TASK}
    model = Scripted(
        tokenizer, lambda text: "import math\n\ndef f(x):\n    return 2 * x\n```\nThis doubles x.\n```python\nf(1)"
    )
    samples = humaneval_samples.generate(model, tokenizer, chosen, tmp_path / "s.jsonl", about={}, chat=True, batch=1)
    (prompt,) = model.prompts
    assert prompt.startswith("<s>Please provide")
    assert prompt.endswith("tests:\n```python\n")
    assert TASK["prompt"].strip() in prompt
    assert samples["T/0"].completion == "\nimport math\n\ndef f(x):\n    return 2 * x"
    assert judge(chosen, {"T/0": samples["T/0"].completion})["T/0"].passed


def test_a_models_own_tests_are_not_judged(tokenizer, tmp_path):
    wrong = "def f(x):\n    assert x or True\n    return 2 * x\n\n# Test cases\nassert f(1) == 3\nassert f(2) == 4\n```"
    chosen = {"T/0": TASK}
    made = humaneval_samples.generate(
        Scripted(tokenizer, lambda text: wrong), tokenizer, chosen, tmp_path / "s.jsonl", about={}, chat=True, batch=1
    )
    assert "assert x" in made["T/0"].completion
    assert judge(chosen, {"T/0": made["T/0"].completion})["T/0"].passed


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("def f(x):\n    return x + x\n", True),
        ("```python\ndef f(x):\n    return x + x\n```\n", True),
        ("```\nprint('hi')\n```\nor\n```py\ndef f(x):\n    return x + x\n```", True),
        ("    return x + x", True),
        ("return x + x", True),
        ("def f(x):\n    return x", False),
        ("I can't.", False),
        ("", False),
    ],
)
def test_code_is_found_in_an_answer(answer, passes):
    assert judge({"T/0": TASK}, {"T/0": completion(TASK, answer, chat=True)})["T/0"].passed == passes


def test_a_completion_ends_where_the_function_does():
    body = "    if x:\n        return 1\n    # inside\n    return 2\n"
    for behind in (
        "\nclass A: pass",
        "\ndef g(): pass",
        "\n# Test",
        "\nif __name__ == 1:",
        "\nprint(f(1))",
        "\n@wrap",
        "\n```",
    ):
        assert cut(body + behind, humaneval.STOPS) == body
    assert cut(body, humaneval.STOPS) == body


def test_what_was_interrupted_goes_on(tokenizer, tmp_path):
    chosen = {f"T/{i}": TASK | {"task_id": f"T/{i}", "prompt": f"def f{i}(x):\n"} for i in range(5)}
    path, about = tmp_path / "s.jsonl", {"scheme": "w8a16", "lengths": (1, 2)}
    model = Scripted(tokenizer, lambda text: f"    return {text!r}\n")

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        humaneval_samples.generate(model, tokenizer, chosen, path, about=about, batch=2, on_done=interrupt)
    assert model.asked == 2
    with path.open("a") as file:
        file.write('{"task_id": "T/4", "compl')  # the machine went off in the middle of a line
    samples = humaneval_samples.generate(model, tokenizer, chosen, path, about=about, batch=2)
    assert model.asked == 6  # three left, and one row to fill the last batch
    assert [s.answer for s in samples.values()] == [
        f"    return {problem['prompt']!r}\n" for problem in chosen.values()
    ]
    assert humaneval_samples.generate(model, tokenizer, chosen, path, about=about, batch=2) == samples
    assert model.asked == 6
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert sorted(json.loads(line)["task_id"] for line in lines) == list(chosen)
    humaneval_samples.generate(model, tokenizer, chosen, path, about=about | {"scheme": "w4a16-g64"}, batch=2)
    assert model.asked == 12  # another scheme's answers are its own


def test_batched_speculation_gives_each_row_its_own_greedy_text(tokenizer, tmp_path):
    torch.manual_seed(3)
    config = tf.LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=160, eos_token_id=1, bos_token_id=0, pad_token_id=1, initializer_range=0.4,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    chosen = {f"T/{i}": TASK | {"task_id": f"T/{i}", "prompt": "def f(x):\n" + "  #" * i} for i in range(5)}
    run = Speculator(Decoder(model), NgramDraft(), k=3)
    samples = humaneval_samples.generate(
        run, tokenizer, chosen, tmp_path / "s.jsonl", about={}, batch=3, max_new_tokens=40
    )
    for name, problem in chosen.items():
        ids = tokenizer(problem["prompt"], return_tensors="pt").input_ids
        wanted = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(wanted, skip_special_tokens=True)
        assert samples[name].answer == cut(text, humaneval.STOPS)
        assert samples[name].finished == (1 in wanted or samples[name].answer != text)


def test_what_does_not_fit_or_exist_is_told(tokenizer, tmp_path):
    with pytest.raises(OptionError, match="165 problems; accepted: 1 to 164"):
        problems(165)
    with pytest.raises(OptionError, match="batch is 0"):
        humaneval_samples.generate(Scripted(tokenizer, str), tokenizer, {}, tmp_path / "s", about={}, batch=0)
    plain = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    with pytest.raises(OptionError, match="no chat template"):
        humaneval.Question.of(TASK, plain, chat=True)


@pytest.mark.parametrize(
    ("passed", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_as_published(passed, n, low, high):
    """The last is example 1 of R. G. Newcombe, Statistics in Medicine 17, 1998, method 3."""
    assert wilson(passed, n, humaneval.NORMAL_P975) == pytest.approx((low, high), abs=5e-5)
