"""What ``qpass eval`` is asked for, checked before a model is loaded, and whether a record answers it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpass.errors import OptionError
from qpass.frontends.commands import session

TASKS = ("perplexity", "kl", "humaneval")

FULL = "bf16"
"""The name under which the model as it was loaded stands among the schemes."""

RECIPE = "recipe"
"""And under which one whose layers' schemes a recipe says."""

CHOICES = ("exclude", "lowering", "stats", "alpha", "recipe")
"""What a result depends on where it was chosen."""


@dataclass(frozen=True)
class Asked:
    """What is to be measured, and how."""

    model: str
    schemes: tuple[str, ...]
    tasks: tuple[str, ...]
    output: Path | None = None
    text: Path | None = None
    tokens: int = 16384
    length: int = 512
    stride: int = 256
    batch: int = 8
    problems: int | None = None
    chat: bool | None = None
    max_new_tokens: int = 512
    draft: str | None = None
    exclude: tuple[str, ...] = ()
    lowering: str | None = None
    reference: str | None = None
    stats: Path | None = None
    alpha: str = "auto"
    recipe: Path | None = None

    def check(self) -> None:
        """Raises OptionError for what needs no model to be seen."""
        for name in self.tasks:
            if name not in TASKS:
                raise OptionError(f"unknown task {name!r}; accepted: {', '.join(TASKS)}")
        if not self.tasks or not all(self.schemes):
            raise OptionError("give at least one scheme and one task")
        if self.output is not None and self.output.is_dir():
            raise OptionError(f"{self.output} is a folder; accepted: a file that JSON lines are added to")
        if not 1 <= self.stride < self.length:
            raise OptionError(
                f"stride is {self.stride}; accepted: 1 to {self.length - 1}, one below the window's length"
            )
        others = set(self.schemes) - {FULL, RECIPE}
        if (RECIPE in self.schemes) != (self.recipe is not None) or (self.recipe is not None and others):
            raise OptionError("a recipe says every layer's scheme: give --recipe FILE, and no --scheme but bf16,recipe")
        for path in (self.stats, self.recipe):
            digest(path)
        for scheme in self.schemes:
            if scheme not in (FULL, RECIPE):
                session.check(self.model, scheme)

    def about(self, scheme: str, **more: Any) -> dict[str, Any]:
        """The settings that a result depends on."""
        alpha = self.alpha if self.stats is not None else None
        values = (list(self.exclude), self.lowering, digest(self.stats), alpha, digest(self.recipe))
        said = {name: value for name, value in zip(CHOICES, values, strict=True) if value}
        return {"model": Path(self.model).name, "scheme": scheme, **(said if scheme != FULL else {}), **more}


def matches(settings: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a record's settings are those that are wanted; it may say more, but no choice that wasn't made."""
    same = all(settings.get(name) == value for name, value in json.loads(json.dumps(wanted)).items())
    return same and not any(name in settings and name not in wanted for name in CHOICES)


def digest(path: Path | None) -> str | None:
    """A file's name and what tells its content from another's."""
    if path is None:
        return None
    if not path.is_file():
        raise OptionError(f"{path} is not a file")
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
