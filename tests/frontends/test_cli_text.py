"""Tokens to text, piece by piece."""

import pytest

from qpass.errors import OptionError
from qpass.frontends import hf
from qpass.frontends.commands.demo import Outcome, table
from qpass.frontends.commands.text import TextStream, encode


@pytest.mark.parametrize("text", ["hello world", "two\nlines\n\nand more", "", "naïve café: 東京 🙂 end", "🙂"])
def test_the_pieces_are_the_text(checkpoint, text):
    """Single-byte tokens: every character beyond ASCII arrives in parts."""
    tokenizer = hf.load(checkpoint).tokenizer
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer(text).input_ids]
    assert "".join(pieces) + stream.end() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_cut_character_comes_out_at_the_end(checkpoint):
    tokenizer = hf.load(checkpoint).tokenizer
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer("a🙂").input_ids[:-1]]
    assert "".join(pieces) == "a"
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"


def test_prompts(checkpoint):
    tokenizer = hf.load(checkpoint).tokenizer
    plain, chat = encode(tokenizer, "hi", False), encode(tokenizer, "hi", None)
    assert plain.shape == (1, 2)
    assert chat.tolist() == [[0, *plain[0].tolist()]]
    with pytest.raises(OptionError, match="the prompt is empty"):
        encode(tokenizer, "", None)


def test_the_demo_table_compares_with_the_first_row():
    rows = [Outcome("bf16", 100, 40, 270_000_000, 30), Outcome("int4", 80, 10, 90_000_000, 20)]
    shown = table(rows)
    cells = [list(column.cells) for column in shown.columns]
    assert cells[0] == ["bf16", "int4"]
    assert cells[1] == ["25.0", "100.0"]
    assert cells[2] == ["1.00x", "4.00x"]
    assert cells[5] == ["100%", "33%"]
