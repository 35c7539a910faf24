"""Options: what a user may ask of the backend, read once and checked at the door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qpass.assignment import Assignment
from qpass.errors import OptionError
from qpass.lowering import by_name


@dataclass(frozen=True)
class Options:
    """``assignment`` says which scheme each module gets; ``lowering`` names the only lowering to use, if any."""

    assignment: Assignment
    lowering: str | None = None
    release_weights: bool = False
    insist: bool = False

    @classmethod
    def make(
        cls,
        *,
        scheme: Any = None,
        exclude: Any = (),
        lowering: str | None = None,
        release_weights: bool = False,
        insist: bool = False,
    ) -> Options:
        """Raises OptionError or SchemeError, which name the culprit and what is accepted."""
        if lowering is not None:
            by_name(lowering)
        for name, value in (("release_weights", release_weights), ("insist", insist)):
            if not isinstance(value, bool):
                raise OptionError(f"{name} takes True or False, not {value!r}")
        return cls(Assignment.make(scheme, exclude), lowering, release_weights, insist)

    @classmethod
    def from_compile(cls, options: Mapping[str, Any] | None, mode: str | None) -> Options:
        """From the ``options=`` and ``mode=`` of ``torch.compile(model, backend="qpass", ...)``."""
        if mode not in (None, "default"):
            raise OptionError(f"backend 'qpass' has no mode {mode!r}; say what you want with options={{'scheme': ...}}")
        options = dict(options or {})
        unknown = [name for name in options if name not in ACCEPTED]
        if unknown:
            raise OptionError(f"unknown option {unknown[0]!r} for backend 'qpass'; accepted: {', '.join(ACCEPTED)}")
        return cls.make(**options)


ACCEPTED = ("scheme", "exclude", *(field.name for field in fields(Options) if field.name != "assignment"))
