"""Text to calibrate on and text to measure on never meet."""

import pytest
import torch

from qpass.errors import OptionError
from qpass.measure.corpus import read_text, windows


def test_the_two_parts_of_the_standard_library_share_no_module():
    calibration, evaluation = (read_text(None, part) for part in ("calibration", "evaluation"))
    assert min(len(calibration), len(evaluation)) > 500_000
    lines = {
        part: {line for line in text.splitlines() if len(line) > 100}
        for part, text in (("calibration", calibration), ("evaluation", evaluation))
    }
    assert len(lines["calibration"] & lines["evaluation"]) <= 5  # the same long line written in two modules


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    for name, text in (("b.txt", "two"), ("a.md", "one"), ("c.bin", "not text")):
        (tmp_path / name).write_text(text)
    assert read_text(tmp_path, "evaluation") == "one\ntwo"


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(OptionError, match="nowhere is neither"):
        read_text(tmp_path / "nowhere", "evaluation")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(OptionError, match=r"latin is not UTF-8 text: .* at byte 3"):
        read_text(tmp_path / "latin", "evaluation")
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(OptionError, match="empty holds no text"):
        read_text(tmp_path / "empty", "evaluation")


def test_windows_are_spread_and_do_not_overlap():
    ids = torch.arange(11)
    assert windows(ids, 2).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert windows(ids, 2, 3).tolist() == [[0, 1], [4, 5], [8, 9]]
    with pytest.raises(OptionError, match="11 tokens: 2 windows of 4, and 3 are needed"):
        windows(ids, 4, 3)
