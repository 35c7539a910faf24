"""Drafts in another vocabulary: with small tokenizers made here, and with two real ones where they are at hand."""

import itertools
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qpass.runtime.draft import NONE, Proposal
from qpass.runtime.translate import TAIL, TranslatedDraft

HOME = Path.home() / ".cache" / "qpass-models"
TEXT = (
    '''def merge(left, right):
    """Merge two sorted lists; naïve, but stable: 列表 🙂."""
    result = []
    while left and right:
        result.append(left.pop(0) if left[0] <= right[0] else right.pop(0))
    return result + left + right


class Heap:
    def __init__(self, items=()):
        self.items = sorted(items)

    def push(self, item):
        self.items = merge(self.items, [item])
'''
    * 4
)


def byte_level(vocabulary: int, eos: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[eos], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def sentence_pieces(vocabulary: int) -> PreTrainedTokenizerFast:
    """In the manner of Llama's: a space before the text, words that begin with one, bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    words = TEXT.encode("ascii", "ignore").decode().replace("\n", " ").split(" ")
    tokenizer.train_from_iterator((word for word in words if word), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def real(name: str):
    if not (HOME / name / "tokenizer.json").exists():
        pytest.skip(f"{name} is not in {HOME}")
    return AutoTokenizer.from_pretrained(HOME / name)


PAIRS = {
    "small into large": lambda: (byte_level(300, "<end>"), byte_level(420, "<eos>")),
    "large into small": lambda: (byte_level(420, "<end>"), byte_level(300, "<eos>")),
    "bytes into pieces": lambda: (byte_level(400, "<end>"), sentence_pieces(380)),
    "pieces into bytes": lambda: (sentence_pieces(380), byte_level(400, "<end>")),
    "SmolLM2 for Qwen": lambda: (real("smollm2-135m"), real("qwen-coder-0.5b")),
    "Qwen for SmolLM2": lambda: (real("qwen-coder-0.5b"), real("smollm2-135m")),
}


class KnowsTheText:
    """A draft that goes on with TEXT, in its own ids, and keeps the rows that it was asked for."""

    def __init__(self, tokenizer, text=TEXT, ends=False):
        self.tokenizer, self.text, self.ends = tokenizer, text, ends
        self.asked: list[list[list[int]]] = []
        self.whole = tokenizer.encode(text, add_special_tokens=False)

    def propose(self, rows, k):
        self.asked.append([list(row) for row in rows])
        found = [self._next(row)[:k] for row in rows]
        longest = max(map(len, found))
        return Proposal(torch.tensor([row + [NONE] * (longest - len(row)) for row in found]).long())

    def _next(self, row):
        said = self.tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not self.text.startswith(said):
            return []
        whole = self.whole
        if whole[: len(row)] == row:
            ids = whole[len(row) :]
        elif self.tokenizer.decode(self.tokenizer.encode("x", add_special_tokens=False) * 2) == "xx":
            ids = self.tokenizer.encode(self.text[len(said) :], add_special_tokens=False)
        else:  # it would begin with a space
            ids = []
        return [*ids, self.tokenizer.eos_token_id] if self.ends else ids


@pytest.mark.parametrize("pair", PAIRS)
def test_what_the_draft_says_comes_back_in_the_targets_ids(pair):
    """At each token of the text: the ids that the target's tokenizer gives the text as far as the draft went on."""
    source, target = PAIRS[pair]()
    text = TEXT if "pieces" not in pair else TEXT.encode("ascii", "ignore").decode()
    draft = KnowsTheText(source, text)
    translated = TranslatedDraft(draft, source, target)
    ids = target.encode(text, add_special_tokens=False)
    said = 0
    for n in range(5, len(ids) - 12, 3):
        proposed = translated.propose([ids[:n]], 6)[0]
        read = target.decode(ids[:n] + proposed, clean_up_tokenization_spaces=False).rstrip("\ufffd")
        assert text.startswith(read)
        if 0 < len(proposed) < 6:
            assert proposed == target.encode(read, add_special_tokens=False)[n:]
        said += bool(proposed)
    assert said > (0.5 if pair == "pieces into bytes" else 0.9) * (len(ids) - 17) / 3


@pytest.mark.parametrize("pair", [p for p in PAIRS if "pieces" not in p])
def test_the_drafts_ids_grow_at_their_end(pair):
    """So that a cache behind it, which goes by the longest common beginning, is of use: a word at most is read again."""
    source, target = PAIRS[pair]()
    draft = KnowsTheText(source)
    translated = TranslatedDraft(draft, source, target)
    ids = target.encode(TEXT, add_special_tokens=False)
    for n in range(5, len(ids), 3):
        translated.propose([ids[:n]], 4)
    assert len(TEXT) > 3 * TAIL
    rows = [asked[0] for asked in draft.asked]
    for before, after in itertools.pairwise(rows):
        common = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
        assert len(before) - common <= 6
    whole = source.encode(TEXT, add_special_tokens=False)
    assert sum(a == b for a, b in zip(rows[-1], whole, strict=False)) > 0.99 * len(rows[-1])


def test_a_row_that_ends_within_a_character_waits():
    source, target = byte_level(300, "<end>"), byte_level(300, "<eos>")
    text = "result = 🙂 # 🙂🙂 naïve"
    draft = KnowsTheText(source, text)
    translated = TranslatedDraft(draft, source, target)
    ids = target.encode(text, add_special_tokens=False)
    whole = [not target.decode(ids[:n]).endswith("\ufffd") for n in range(1, len(ids))]
    assert not all(whole)
    for n, complete in enumerate(whole, 1):
        proposed = translated.propose([ids[:n]], 8)[0]
        assert bool(proposed) == complete
        assert "\ufffd" not in target.decode(proposed)


def test_bytes_that_are_no_character_do_not_stop_it():
    tokenizer = byte_level(300, "<end>")
    draft = KnowsTheText(tokenizer)
    translated = TranslatedDraft(draft, tokenizer, tokenizer)
    row = tokenizer.encode("🙂", add_special_tokens=False)[:1] * 6
    assert translated.propose([row], 4) == [[]]
    row += tokenizer.encode("merge(left", add_special_tokens=False)
    translated.propose([row], 4)
    assert draft.asked[-1][0][-2:] == row[-2:]


def test_the_drafts_end_is_the_targets_end():
    source, target = byte_level(300, "<end>"), byte_level(420, "<eos>")
    translated = TranslatedDraft(KnowsTheText(source, "return result", ends=True), source, target)
    ids = target.encode("return result", add_special_tokens=False)
    assert translated.propose([ids[:-1]], 8) == [[ids[-1], target.eos_token_id]]
    assert translated.propose([ids], 8) == [[target.eos_token_id]]


def test_rows_of_a_batch_keep_apart_and_may_change():
    source, target = byte_level(300, "<end>"), byte_level(420, "<eos>")
    draft = KnowsTheText(source)
    translated = TranslatedDraft(draft, source, target)
    ids = target.encode(TEXT, add_special_tokens=False)
    other = target.encode("something else", add_special_tokens=False)
    assert translated.propose([other, ids[:30], ids[:60]], 3)[0] == []
    for rows in ([ids[:31], ids[:61]], [ids[:20], ids[:62]], [ids[:62], ids[:31]]):  # one ended, one cut, both moved
        proposed = translated.propose(rows, 6)
        assert proposed == [TranslatedDraft(draft, source, target).propose([row], 6)[0] for row in rows]
        assert all(proposed)
    assert translated.propose([[]], 3) == [[]]


def test_a_bos_is_not_text():
    source, target = byte_level(300, "<end>"), byte_level(420, "<eos>")
    for tokenizer in (source, target):
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    draft = KnowsTheText(source)
    TranslatedDraft(draft, source, target).propose([target("def merge").input_ids], 3)
    assert draft.asked == [[source("def merge").input_ids]]
