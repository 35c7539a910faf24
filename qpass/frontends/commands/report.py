from __future__ import annotations


def report(records, *, output, title, pictures): ...
