"""Which scheme each module gets: one for all, a table of name patterns, or the user's own function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qpass.errors import OptionError, SchemeError
from qpass.scheme import DEFAULT_SCHEME, HEAD_SCHEME, Scheme

SchemeChoice = str | Scheme | Mapping[str, str | Scheme] | Callable[[str], str | Scheme | None]

KEPT_NAMES = (
    *("lm_head", "embed_out"),  # what the decoder families call the layer that gives the logits
    *("gate", "router", "shared_expert_gate"),  # and the one that picks experts: tiny, and a flip changes everything
)
"""Modules that keep eight bits, and 16-bit activations, in a scheme of less, unless the user names them."""


@dataclass(frozen=True)
class Assignment:
    """``base`` for every module, unless a pattern (first match wins), the function or :data:`KEPT_NAMES` says otherwise."""

    base: Scheme
    patterns: tuple[tuple[str, Scheme], ...] = ()
    function: Callable[[str], str | Scheme | None] | None = None
    exclude: tuple[str, ...] = ()

    @classmethod
    def make(cls, choice: SchemeChoice | None, exclude: Sequence[str] | str = ()) -> Assignment:
        """Read what the user wrote. Raises SchemeError or OptionError, which name what is accepted.

        In a table, ``"*"`` is the scheme of all others; without it they get the default.
        """
        exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        if not all(isinstance(pattern, str) for pattern in exclude):
            raise OptionError(
                f"exclude takes module name patterns such as 'lm_head' or 'model.layers.0.*', not {exclude!r}"
            )
        if choice is None or isinstance(choice, str | Scheme):
            return cls(_scheme(choice or DEFAULT_SCHEME), exclude=exclude)
        if isinstance(choice, Mapping):
            for pattern in choice:
                if not isinstance(pattern, str):
                    raise OptionError(f"a table of schemes is keyed by module name patterns, not by {pattern!r}")
            table = {pattern: _scheme(scheme) for pattern, scheme in choice.items()}
            base = table.pop("*", _scheme(DEFAULT_SCHEME))
            return cls(base, tuple(table.items()), exclude=exclude)
        if callable(choice):
            return cls(_scheme(DEFAULT_SCHEME), function=choice, exclude=exclude)
        raise SchemeError(
            f"scheme takes a name, a table {{module pattern: name}} or a function of the module name, not {type(choice).__name__}"
        )

    def __call__(self, name: str, tied: bool = False) -> Scheme:
        """The scheme of the module ``name``; ``tied`` when its weight is also an embedding table."""
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return Scheme.parse("w16a16")
        for pattern, scheme in self.patterns:
            if fnmatchcase(name, pattern):
                return scheme
        if self.function is not None:
            chosen = self.function(name)
            if chosen is not None:
                return _scheme(chosen)
        keeps = tied or name.rpartition(".")[2] in KEPT_NAMES
        if keeps and self.base.weight is not None and (self.base.weight.bits < 8 or self.base.activation != "a16"):
            return Scheme.parse(HEAD_SCHEME)
        return self.base

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Those that are known before any module is named."""
        return (self.base, *(scheme for _, scheme in self.patterns))

    def check(self, names: Iterable[str]) -> None:
        """Raise OptionError for a pattern that matches none of the linear layers ``names``."""
        names = sorted(set(names))
        for pattern in (*(pattern for pattern, _ in self.patterns), *self.exclude):
            if not any(fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
                raise OptionError(
                    f"the module pattern {pattern!r} matches none of the linear layers: {shown or '(there are none)'}"
                )


def _scheme(choice: str | Scheme) -> Scheme:
    return choice if isinstance(choice, Scheme) else Scheme.parse(choice)
