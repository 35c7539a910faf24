"""Text that is always there: the source of Python's standard library, one part to calibrate on, another to measure on."""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qpass.errors import OptionError

Part = Literal["calibration", "evaluation"]

SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".csv", ".html", ".c", ".h", ".cpp", ".js", ""})
"""Files of a folder that count as text."""

LARGEST_BYTES = 256 << 20
"""Of one text file: more is a mistake in the name rather than a text to read whole."""


def read_text(source: Path | None, part: Part) -> str:
    """All text of a file or of a folder's text files, in the order of their names.

    None is the standard library: its top-level modules, of which every third (by a hash of the name) is for calibration
    and the others are for evaluation, so that no text is in both. Raises OptionError for a source that can't be read as
    UTF-8 text, or that holds none.
    """
    if part not in ("calibration", "evaluation"):
        raise OptionError(f"a corpus has the parts 'calibration' and 'evaluation', not {part!r}")
    if source is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        files = [path for path in sorted(library.glob("*.py")) if _is_calibration(path.name) == (part == "calibration")]
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    source = Path(source)
    if source.is_dir():
        files = sorted(p for p in source.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES)
    elif source.is_file():
        files = [source]
    else:
        raise OptionError(f"{source} is neither a text file nor a folder of text files")
    text = "\n".join(_read(path) for path in files)
    if not text.strip():
        raise OptionError(f"{source} holds no text")
    return text


def windows(ids: Tensor, length: int, count: int | None = None) -> Tensor:
    """Token ids [T] in consecutive windows without overlap: int64 [count, length]; what is left over at the end is dropped.

    ``count`` takes as many, evenly spread over the text; None takes all. Raises OptionError for a text that is too short.
    """
    available = ids.numel() // length
    wanted = available if count is None else count
    if available < max(1, wanted):
        raise OptionError(
            f"the text has {ids.numel()} tokens: {available} windows of {length}, and {max(1, wanted)} are needed"
        )
    whole = ids.reshape(-1)[: available * length].view(available, length).long()
    return whole[torch.linspace(0, available - 1, wanted).round().long()]


def _is_calibration(module: str) -> bool:
    return zlib.crc32(module.encode()) % 3 == 0


def _read(path: Path) -> str:
    if path.stat().st_size > LARGEST_BYTES:
        raise OptionError(f"{path} has more than {LARGEST_BYTES >> 20} MB; calibrate or measure on a part of it")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
