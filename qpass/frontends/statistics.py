"""Statistics: what calibration saw of each linear's input, as a plain safetensors file that knows its model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.algorithms.observe import BINS, EXTREMES, SAMPLE, Observer
from qpass.errors import CheckpointError, OptionError
from qpass.passes.calibrated import Calibrated

FORMAT = "qpass statistics 2"

_TENSORS = ("low", "high", "histogram", "sample", "priorities", "extremes", "peaks")
_NUMBERS = ("rows", "limit", "seed")
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32)}


@dataclass(eq=False)
class Statistics:
    """``linears``: each linear's shape (N, K) by its name. ``inputs``: by the names of the linears that read one input."""

    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    inputs: dict[tuple[str, ...], Observer] = field(default_factory=dict)
    batches: int = 0  # seen so far
    settings: str = ""  # what they were, so that a run is resumed on the same ones only
    _calibrated: dict[str, Calibrated] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def read(cls, given: Statistics | str | Path) -> Statistics:
        """Statistics as they are, or from a file, which is read once while it stays the same. Raises OptionError, CheckpointError."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, str | Path):
            raise OptionError(
                f"stats takes what qpass.calibrate returned, or a file that it saved, not {type(given).__name__}"
            )
        path = Path(given).expanduser().resolve()
        written = path.stat().st_mtime_ns if path.is_file() else 0
        known = _read.get(path)
        if known is None or known[0] != written:
            _read[path] = known = (written, cls.load(path))
        return known[1]

    def calibrated(self, alpha: Any) -> Calibrated:
        """What the passes may ask; the same object for the same alpha, so that all graphs of a model decide alike."""
        table = _alphas(alpha)
        key = repr(table)
        if key not in self._calibrated:
            observers = self._by_name()
            self._calibrated[key] = Calibrated(
                observers.get, lambda name: next((a for pattern, a in table if fnmatchcase(name, pattern)), "auto")
            )
        return self._calibrated[key]

    @property
    def fingerprint(self) -> str:
        """Of the model: the names and shapes of its linears."""
        lines = sorted(f"{name} {n} {k}" for name, (n, k) in self.linears.items())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """Rows that the busiest input saw."""
        return max((observer.rows for observer in self.inputs.values()), default=0)

    def observe(
        self, names: tuple[str, ...], shapes: Sequence[tuple[int, int]], dtype: torch.dtype, hessian: bool, seed: int
    ) -> Observer:
        """The observer of a new input that the linears ``names`` read."""
        self.linears.update(zip(names, shapes, strict=True))
        mixed = int.from_bytes(hashlib.sha256("\n".join((str(seed), *names)).encode()).digest()[:3], "big")
        self.inputs[names] = Observer(shapes[0][1], dtype, hessian, mixed)
        return self.inputs[names]

    def of(self, name: str) -> Observer | None:
        """What the linear ``name`` read."""
        return self._by_name().get(name)

    def _by_name(self) -> dict[str, Observer]:
        return {name: observer for names, observer in self.inputs.items() for name in names}

    def check(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """Raise OptionError, naming a linear, unless all that were observed are among ``linears`` with the same shape."""
        for name, (n, k) in self.linears.items():
            found = linears.get(name)
            if found != (n, k):
                what = "has none of this name" if found is None else f"has it with [{found[0]}, {found[1]}]"
                raise OptionError(
                    f"the statistics are of another model: they know a linear {name!r} [{n}, {k}], and this model {what}"
                )

    def check_model(self, model: nn.Module) -> None:
        """:meth:`check` against the modules that own a matrix."""
        linears: dict[str, tuple[int, int]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2:
                rows, columns = weight.shape
                known = self.linears.get(name)
                linears[name] = known if known == (columns, rows) else (rows, columns)  # transformers' Conv1D is [K, N]
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 2 and own != "weight":
                    full = f"{name}.{own}" if name else own
                    rows, columns = parameter.shape
                    linears[full] = self.linears.get(full, (rows, columns))
        self.check(linears)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; a reader never sees half of one."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        entries = []
        for index, (names, observer) in enumerate(self.inputs.items()):
            for part in (*_TENSORS, *(("squares",) if observer.squares is not None else ())):
                tensors[f"{index}.{part}"] = getattr(observer, part).contiguous()
            numbers = {part: getattr(observer, part) for part in _NUMBERS}
            entries.append({"names": names, "dtype": str(observer.dtype).removeprefix("torch."), **numbers})
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "linears": json.dumps(self.linears),
            "inputs": json.dumps(entries),
            "batches": str(self.batches),
            "settings": self.settings,
        }
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, temporary, metadata)
            temporary.replace(path)
        except OSError as error:
            raise OptionError(f"{path}: the statistics could not be written: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read and validate. Raises OptionError for a file that is not there, CheckpointError for one that is no such file."""
        from safetensors import safe_open

        if not Path(path).is_file():
            raise OptionError(f"{path} does not exist; `qpass calibrate MODEL -o {path}` makes a file of statistics")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        except Exception as error:  # a foreign file can make its reader fail in any way
            raise CheckpointError(f"{path} is not a safetensors file: {str(error).splitlines()[0]}") from error
        if metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is not a file of statistics: its format is {metadata.get('format')!r}, accepted is {FORMAT!r}"
            )
        try:
            return cls._decode(metadata, tensors)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is a damaged file of statistics: {error}") from error

    @classmethod
    def _decode(cls, metadata: dict[str, str], tensors: dict[str, Tensor]) -> Statistics:
        linears = {str(name): (int(n), int(k)) for name, (n, k) in json.loads(metadata["linears"]).items()}
        inputs = {
            tuple(map(str, entry["names"])): _observer(entry, tensors, f"{index}.")
            for index, entry in enumerate(json.loads(metadata["inputs"]))
        }
        result = cls(linears, inputs, int(metadata["batches"]), metadata["settings"])
        for names, observer in inputs.items():
            for name in names:
                if linears[name][1] != observer.k:
                    raise ValueError(f"{name} has {linears[name][1]} inputs, its statistics {observer.k}")
        if metadata["fingerprint"] != result.fingerprint:
            raise ValueError("its fingerprint is not that of its linears")
        return result


_read: dict[Path, tuple[int, Statistics]] = {}  # by path: when it was written, and what it said


def _alphas(alpha: Any) -> list[tuple[str, float | str | None]]:
    """Patterns of module names and their alphas, the first that matches counts."""
    if not isinstance(alpha, Mapping):
        return [("*", _alpha(alpha))]
    if not all(isinstance(pattern, str) for pattern in alpha):
        raise OptionError("a table of alphas is keyed by module name patterns such as 'model.layers.0.*'")
    rest = [("*", _alpha(alpha["*"]))] if "*" in alpha else []
    return [*((pattern, _alpha(value)) for pattern, value in alpha.items() if pattern != "*"), *rest]


def _alpha(value: Any) -> float | str | None:
    if value is None or value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise OptionError(
            f"alpha takes a number from 0 to 1, 'auto', None, or a table of these by module pattern, not {value!r}"
        )
    return float(value)


def _observer(entry: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> Observer:
    """One input's, with every shape, dtype and value checked."""
    found = {part: tensors[prefix + part] for part in _TENSORS}
    squares = tensors.get(f"{prefix}squares")
    dtype, k = _DTYPES[entry["dtype"]], found["low"].numel()
    kept, highest = len(found["priorities"]), len(found["peaks"])
    expected: dict[str, tuple[torch.dtype, list[int]]] = {
        "low": (torch.float32, [k]),
        "high": (torch.float32, [k]),
        "histogram": (torch.int64, [BINS]),
        "sample": (dtype, [kept, k]),
        "priorities": (torch.float64, [kept]),
        "extremes": (dtype, [highest, k]),
        "peaks": (torch.float32, [highest]),
        "squares": (torch.float64, [k]),
    }
    for part, tensor in (*found.items(), *((("squares", squares),) if squares is not None else ())):
        if (tensor.dtype, list(tensor.shape)) != expected[part]:
            raise ValueError(f"{prefix}{part} is {tensor.dtype} {list(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{prefix}{part} holds NaN or infinity")
    if k == 0 or kept > SAMPLE or highest > EXTREMES:
        raise ValueError(f"{prefix}sample has {kept} + {highest} rows of {k}")
    observer = Observer(k, dtype, squares is not None, int(entry["seed"]), int(entry["rows"]))
    observer.limit = float(entry["limit"])
    if not 0 <= observer.limit < float("inf"):
        raise ValueError(f"{prefix}limit is {observer.limit}")
    if bool((found["low"] > found["high"]).any()):
        raise ValueError(f"{prefix}low is above {prefix}high")
    for part, tensor in found.items():
        setattr(observer, part, tensor)
    observer.squares = squares
    return observer
