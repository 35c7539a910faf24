"""Tokens to text, piece by piece, and a prompt to tokens."""

from __future__ import annotations

from typing import Any

from qpass.errors import OptionError


class TextStream:
    """Turns tokens into the text they add. A character whose bytes are not all there yet is held back."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.start = 0  # tokens before this one are printed for good
        self.printed = ""

    def push(self, token: int) -> str:
        self.tokens.append(token)
        text = self._decode(self.tokens[self.start :])
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new = text[len(self.printed) :]
        if "\n" in new:  # a line's end is a safe place to start anew, so that decoding stays cheap
            self.start, self.printed = len(self.tokens), ""
        else:
            self.printed = text
        return new

    def end(self) -> str:
        """What was held back."""
        return self._decode(self.tokens[self.start :])[len(self.printed) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def encode(tokenizer: Any, prompt: str, chat: bool | None) -> Any:
    """Token ids [1, S]. ``chat`` None: the tokenizer's chat template where it has one. Raises OptionError."""
    if not prompt:
        raise OptionError("the prompt is empty; give some text with --prompt")
    templated = getattr(tokenizer, "chat_template", None) is not None
    if chat and not templated:
        raise OptionError("this tokenizer has no chat template; use --no-chat")
    if templated and chat is not False:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
    return tokenizer(prompt, return_tensors="pt").input_ids
