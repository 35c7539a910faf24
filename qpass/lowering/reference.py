"""Plain torch over the codes: the meaning of the op, and the last resort."""

from __future__ import annotations

from torch import Tensor, fx

from qpass.cpu import Cpu
from qpass.lowering.site import Site
from qpass.qweight import QWeight


class Reference:
    name = "reference"
    portable = False

    def same_rows(self, site: Site, cpu: Cpu) -> int:
        return 0

    def refuse(self, site: Site, cpu: Cpu) -> str | None:
        return None

    def pack(self, weight: QWeight, *, glu: bool) -> tuple[Tensor, ...]:
        return weight.codes, weight.scales, weight.zeros

    def emit(self, graph: fx.Graph, node: fx.Node, packed: tuple[fx.Node, ...]) -> fx.Node:
        with graph.inserting_before(node):
            return graph.create_node(
                "call_function", node.target, (node.args[0], *packed, *node.args[4:]), dict(node.kwargs)
            )
