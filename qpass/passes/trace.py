"""QPASS_TRACE=dir: the graph after each pass as Python, one file a pass, so that neighbours can be diffed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qpass.passes.values import value_of


@dataclass
class Trace:
    """Writes ``graph_000/01_canonicalize.py`` and so on below a folder; silent without one."""

    folder: Path | None
    written: int = 0

    @classmethod
    def from_environment(cls) -> Trace:
        """The trace that ``QPASS_TRACE`` asks for, in the next free subfolder: each captured graph has its own."""
        root = os.environ.get("QPASS_TRACE")
        return cls(_next_folder(Path(root)) if root else None)

    def write(self, name: str, graph: fx.Graph, count: int | None = None) -> None:
        if self.folder is None:
            return
        title = f"after {name}" + ("" if count is None else f": {count} matches")
        (self.folder / f"{self.written:02d}_{name}.py").write_text(f"# qpass: {title}\n{render(graph)}")
        self.written += 1

    def hint(self) -> str:
        """Where to look, for an error message."""
        if self.folder is None:
            return " (set QPASS_TRACE=dir to get the graph after each pass)"
        return f" (the graph after each pass: {self.folder})"


def render(graph: fx.Graph) -> str:
    """The graph as a Python function; shapes, dtypes and module names stand behind each line."""
    parameters, body = ["self,"], []
    for node in graph.nodes:
        note = _describe(node)
        comment = f"  # {note}" if note else ""
        if node.op == "placeholder":
            parameters.append(f"{node.name},{comment}")
        elif node.op == "output":
            body.append(f"return {_format(node.args[0])}")
        else:
            body.append(f"{node.name} = {_call(node)}{comment}")
    lines = [*_imports(graph), "", "", "def forward(", *(f"    {line}" for line in parameters), "):"]
    return "\n".join([*lines, *(f"    {line}" for line in body)]) + "\n"


def _imports(graph: fx.Graph) -> list[str]:
    """What the function needs; a lowering's own functions live in modules of ours."""
    ours = {
        module for node in graph.nodes if (module := getattr(node.target, "__module__", "") or "").startswith("qpass.")
    }
    ours |= {"qpass.ops" for node in graph.nodes if _qualified(node.target).startswith("torch.ops.qpass.")}
    fixed = [
        "import operator",
        "",
        "import torch",
        "import torch.nn.functional as F",
        "from torch import device, inf, nan",
    ]
    return [*fixed, "", *(f"import {module}" for module in sorted(ours))] if ours else fixed


def _call(node: fx.Node) -> str:
    args = [_format(arg) for arg in node.args]
    keywords = [f"{key}={_format(value)}" for key, value in node.kwargs.items()]
    if node.op == "get_attr":
        return f"self.{node.target}"
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join(args[1:] + keywords)})"
    if node.op == "call_module":
        return f"self.get_submodule({node.target!r})({', '.join(args + keywords)})"
    return f"{_qualified(node.target)}({', '.join(args + keywords)})"


def _qualified(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}"
    module, name = getattr(target, "__module__", "") or "", getattr(target, "__name__", repr(target))
    if module == "torch.nn.functional" or getattr(torch.nn.functional, name, None) is target:
        return f"F.{name}"
    if module in ("_operator", "builtins"):
        return f"operator.{name}" if module == "_operator" else name
    if getattr(torch, name, None) is target:
        return f"torch.{name}"
    return f"{module}.{name}" if module else name


def _format(value: Any) -> str:
    match value:
        case fx.Node():
            return value.name
        case tuple():
            return f"({', '.join(map(_format, value))}{',' if len(value) == 1 else ''})"
        case list():
            return f"[{', '.join(map(_format, value))}]"
        case dict():
            return "{" + ", ".join(f"{key!r}: {_format(item)}" for key, item in value.items()) + "}"
        case slice():
            return f"slice({_format(value.start)}, {_format(value.stop)}, {_format(value.step)})"
        case torch.layout() | torch.memory_format() | torch.dtype():
            return str(value)
        case None | bool() | int() | float() | complex() | str() | torch.device():
            return repr(value)
    return "..." if value is Ellipsis else repr(f"<{type(value).__name__}>")


def _describe(node: fx.Node) -> str:
    notes = [_shape(value_of(node)), " + ".join(node.meta.get("qpass_names", ()))]
    return "  ".join(filter(None, notes))


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return ", ".join(filter(None, map(_shape, value)))
    return ""


def _next_folder(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    index = 0
    while True:  # several processes may trace into one folder: whoever creates it owns it
        folder = root / f"graph_{index:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            index += 1
        else:
            return folder
