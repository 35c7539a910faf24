"""Recipe: a scheme for each linear of a model, with what was measured to find it; a readable JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qpass.errors import CheckpointError, OptionError, QpassError
from qpass.scheme import Scheme

FORMAT = "qpass recipe 1"


@dataclass(frozen=True)
class Choice:
    """One input's linears, which share a scheme, and why they have it."""

    names: tuple[str, ...]
    scheme: str
    bytes: int
    microseconds: float  # of one token, as measured on the machine of the search
    kl: float  # of the model's output when only these linears are quantized so, nats a token
    reason: str = ""


@dataclass(frozen=True)
class Recipe:
    """``choices`` in the model's order; ``summary``: what was asked, and what all of them together come to."""

    choices: tuple[Choice, ...]
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Each linear's scheme by its name; what the recipe doesn't know stays as it is."""
        table = {name: Scheme.parse(choice.scheme) for choice in self.choices for name in choice.names}
        return table | {"*": Scheme.parse("w16a16")}

    @property
    def bytes(self) -> int:
        return sum(choice.bytes for choice in self.choices)

    def explain(self) -> str:
        """What was asked, what it comes to, and a line for each input: its scheme, and why."""
        lines = [f"{key}: {value}" for key, value in self.summary.items()]
        width = max((len(_short(c.names)) for c in self.choices), default=0)
        for c in self.choices:
            lines.append(
                f"{_short(c.names):{width}}  {c.scheme:14} {c.bytes / 1e6:8.2f} MB {c.microseconds:8.1f} us  KL {c.kl:.2e}  {c.reason}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.explain()

    def save(self, path: str | Path) -> None:
        """Write the file; a reader never sees half of one."""
        data = {"format": FORMAT, "summary": self.summary, "choices": [asdict(choice) for choice in self.choices]}
        write_json(Path(path), data)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Raises OptionError for a file that is not there, CheckpointError for one that is no recipe."""
        data = read_json(Path(path), FORMAT, "recipe")
        try:
            choices = tuple(
                Choice(
                    tuple(map(str, c["names"])),
                    Scheme.parse(c["scheme"]).name,
                    int(c["bytes"]),
                    float(c["microseconds"]),
                    float(c["kl"]),
                    str(c["reason"]),
                )
                for c in data["choices"]
            )
            return cls(choices, dict(data["summary"]))
        except (KeyError, TypeError, ValueError, QpassError) as error:
            raise CheckpointError(f"{path} is a damaged recipe: {error}") from error

    @classmethod
    def read(cls, given: Any) -> Recipe:
        """A recipe as it is, or from a file."""
        if isinstance(given, cls):
            return given
        if isinstance(given, str | Path):
            return cls.load(given)
        raise OptionError(f"recipe takes what qpass.search returned, or a file of it, not {type(given).__name__}")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise OptionError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, format: str, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise OptionError(f"{path} does not exist; a {what} is wanted")
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a {what}: {error}") from error
    if not isinstance(data, dict) or data.get("format") != format:
        raise CheckpointError(f"{path} is not a {what}: its format is not {format!r}")
    return data


def _short(names: tuple[str, ...]) -> str:
    """``model.layers.0.self_attn.{q_proj,k_proj,v_proj}``."""
    parents = {name.rpartition(".")[0] for name in names}
    if len(names) == 1 or len(parents) > 1:
        return "+".join(names)
    return f"{parents.pop()}.{{{','.join(name.rpartition('.')[2] for name in names)}}}"
