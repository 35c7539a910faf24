"""What a linear layer is called: the name of its module, as ``named_modules()`` would print it."""

from __future__ import annotations

import re

from torch import fx

# A decorated forward is `wrapper(*args, **kwargs)` to Dynamo: its module is the first of these.
_ROOT = re.compile(
    r"(?:L\['args'\]\[0\]|[LG]\['(?P<variable>\w+)'\])"
    r"(?:\.__self__|\.__func__|\.__wrapped__|\.__closure__\[(?P<cell>\d+)\]\.cell_contents)*"
)
_STEP = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]|\.(\w+)")


class Names:
    """Names of the Parameters and modules of one Dynamo graph, relative to the module that was compiled.

    A function over several modules gives each name something in front: the variable's name for arguments and globals
    (``draft.lm_head``), the cell's number for what it closes over (``cell1.lm_head``).
    """

    def __init__(self, graph: fx.Graph, parameters: dict[str, object]) -> None:
        self._parameters = {
            node: source
            for node in graph.find_nodes(op="placeholder")
            if node.name in parameters and (source := _source(node))
        }
        roots = {match[0] for source in self._parameters.values() if (match := _ROOT.match(source))}
        self._several = len(roots) > 1

    def parameter(self, placeholder: fx.Node) -> str:
        """``model.layers.0.mlp.up_proj.weight``."""
        source = self._parameters.get(placeholder)
        return self._path(source) if source else str(placeholder.target)

    def module(self, node: fx.Node) -> str:
        """The innermost module whose forward computed the node; empty for the compiled module itself, or none."""
        stack = node.meta.get("nn_module_stack")
        return self._path(next(reversed(stack.values()))[0]) if stack else ""

    def linear(self, node: fx.Node, weight: fx.Node | None) -> str:
        """The module that owns the weight; where the weight is tied to another module's, the module that runs."""
        module = self.module(node)
        if weight is None:
            return module or node.name
        name = self.parameter(weight)
        if module and not name.startswith(f"{module}."):
            return module
        return name.removesuffix(".weight")

    def _path(self, source: str) -> str:
        match = _ROOT.match(source)
        if match is None:
            return source
        steps = [next(filter(None, groups)) for groups in _STEP.findall(source[match.end() :])]
        if self._several:
            steps.insert(0, (match["variable"] or "args") if match["cell"] is None else f"cell{match['cell']}")
        return ".".join(steps)


def _source(placeholder: fx.Node) -> str | None:
    source = getattr(placeholder, "_dynamo_source", None)
    return getattr(source, "name", None)
