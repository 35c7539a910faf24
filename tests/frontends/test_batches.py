"""Batches from everything that a user may have, and a sentence for what can't be one."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from qpass.errors import OptionError
from qpass.frontends.batches import read_batches

IDS = torch.arange(24).view(4, 6)


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text, **options):
        most = options.get("max_length", len(text))
        return type("Encoding", (), {"input_ids": torch.tensor([[ord(c) for c in text[:most]]])})


def ids(*arguments, **options):
    return [batch["input_ids"].tolist() for batch in read_batches(*arguments, **options)]


def test_a_tensor_row_by_row_and_in_batches():
    assert ids(IDS) == [[row] for row in IDS.tolist()]
    assert ids(IDS, batch=3) == [IDS[:3].tolist(), IDS[3:].tolist()]
    assert ids(IDS, count=2) == [[row] for row in IDS[:2].tolist()]


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda: iter(IDS), id="iterable of rows"),
        pytest.param(lambda: [{"input_ids": row.tolist()} for row in IDS], id="mappings of lists"),
        pytest.param(lambda: DataLoader(IDS, batch_size=1), id="DataLoader"),
        pytest.param(lambda: DataLoader(TensorDataset(IDS), batch_size=1), id="DataLoader of a TensorDataset"),
    ],
)
def test_iterables(source):
    assert ids(source()) == [[row] for row in IDS.tolist()]


def test_a_mapping_keeps_its_other_entries():
    mask = torch.ones(1, 6)
    (batch,) = read_batches([{"input_ids": IDS[:1], "attention_mask": mask}])
    assert batch["attention_mask"] is mask


def test_text_of_a_file_in_windows_spread_over_it(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij")
    assert ids(path, Letters(), length=2, count=None) == [[[ord(a), ord(b)]] for a, b in ("ab", "cd", "ef", "gh", "ij")]
    assert ids(str(path), Letters(), length=2, count=2) == [[[97, 98]], [[105, 106]]]
    assert ids(["abc", "d"], Letters(), length=2) == [[[97, 98]], [[100]]]


def test_the_standard_library_is_the_default():
    (batch,) = read_batches(None, Letters(), length=50, count=1)
    assert batch["input_ids"].shape == (1, 50)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "needs a tokenizer"),
        (["text"], "needs a tokenizer"),
        ([], "empty"),
        (torch.zeros(0, 4, dtype=torch.int64), "empty"),
        (torch.rand(2, 4), "token ids"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), "not [1, 2, 3]"),
        ([{"labels": IDS}], "without input_ids (it has labels)"),
        ([3.5], "batch 0 is a float"),
        (7, "not int"),
        ({"input_ids": IDS}, "not dict"),
        (torch.zeros(1, 2, dtype=torch.int64, device="meta"), "is on meta"),
    ],
)
def test_what_is_no_batch_is_named(source, words):
    with pytest.raises(OptionError, match="(?s).*" + words.replace("[", r"\[").replace("(", r"\(").replace(")", r"\)")):
        list(read_batches(source))
