"""Options: what a user may ask of the backend, read once and checked at the door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qpass.assignment import Assignment
from qpass.errors import OptionError
from qpass.frontends.recipe import Recipe
from qpass.frontends.statistics import Statistics
from qpass.lowering import by_name
from qpass.passes.calibrated import Calibrated


@dataclass(frozen=True)
class Options:
    """``assignment`` says which scheme each module gets; ``lowering`` names the only lowering to use, if any.

    ``stats`` are what calibration saw, and ``calibrated`` what is made of them with the user's alpha.
    """

    assignment: Assignment
    lowering: str | None = None
    release_weights: bool = False
    insist: bool = False
    stats: Statistics | None = None
    calibrated: Calibrated | None = None

    @classmethod
    def make(
        cls,
        *,
        scheme: Any = None,
        exclude: Any = (),
        lowering: str | None = None,
        release_weights: bool = False,
        insist: bool = False,
        stats: Any = None,
        alpha: Any = "auto",
        recipe: Any = None,
    ) -> Options:
        """Raises OptionError or SchemeError, which name the culprit and what is accepted."""
        if recipe is not None:
            if scheme is not None:
                raise OptionError("a recipe says every layer's scheme: leave scheme out, or the recipe")
            scheme = Recipe.read(recipe).schemes
        if lowering is not None:
            by_name(lowering)
        for name, value in (("release_weights", release_weights), ("insist", insist)):
            if not isinstance(value, bool):
                raise OptionError(f"{name} takes True or False, not {value!r}")
        assignment = Assignment.make(scheme, exclude)
        found = None if stats is None else Statistics.read(stats)
        if found is None:
            needy = next((s for s in assignment.schemes if s.needs_statistics), None)
            if needy is not None:
                raise OptionError(
                    f"scheme {needy} needs statistics of the model's activations: pass stats=qpass.calibrate(model, batches), "
                    "or the path of a file that `qpass calibrate` wrote"
                )
            if alpha != "auto" and alpha is not None:
                raise OptionError("alpha says how to smooth by statistics: pass stats= with it")
        calibrated = None if found is None else found.calibrated(alpha)
        return cls(assignment, lowering, release_weights, insist, found, calibrated)

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


ACCEPTED = ("scheme", "exclude", "lowering", "release_weights", "insist", "stats", "alpha", "recipe")
