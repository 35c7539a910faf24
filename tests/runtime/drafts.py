"""Drafts that tests can rely on."""

from __future__ import annotations

import torch

from qpass.runtime.draft import NONE, Proposal


class Oracle:
    """Knows what every row will be and proposes that, with a wrong token wherever ``wrong(place)`` says so."""

    def __init__(self, texts, prompts, wrong=lambda place: False):
        self.texts, self.prompts, self.wrong, self.calls = texts, prompts, wrong, 0

    def propose(self, rows, k):
        self.calls += 1
        out = []
        for row in rows:
            text = next((t for t in self.texts if t[: len(row)] == list(row)), None)
            assert text is not None, "the loop showed a draft something that is not a prefix of the target's text"
            places = range(len(row), min(len(row) + k, len(text)))
            out.append([(text[i] + 1) % 90 + 3 if self.wrong(i) else text[i] for i in places])
        return out


class Random:
    """Proposes anything; with ``vocabulary``, draws it from a random distribution and says which."""

    def __init__(self, vocabulary, seed=0, drawn=False):
        self.vocabulary, self.drawn = vocabulary, drawn
        self.generator = torch.Generator().manual_seed(seed)

    def propose(self, rows, k):
        probs = torch.rand(len(rows), k, self.vocabulary, generator=self.generator)
        probs = probs / probs.sum(-1, keepdim=True)
        tokens = torch.multinomial(probs.flatten(0, 1), 1, generator=self.generator).view(len(rows), k)
        return Proposal(tokens, probs if self.drawn else None)


class Silent:
    """Never has anything to say, in each of the ways there are."""

    def __init__(self):
        self.calls = 0

    def propose(self, rows, k):
        self.calls += 1
        nothing = torch.full((len(rows), k), NONE)
        return [nothing, nothing[:, :0], [[] for _ in rows]][self.calls % 3]
