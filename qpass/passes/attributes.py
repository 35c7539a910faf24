"""Constants of a graph: tensors that hang on its module, each under a name of its own."""

from __future__ import annotations

from torch import Tensor, fx
from torch._dynamo.source import ConstantSource


def attach(graph: fx.Graph, stem: str, tensor: Tensor) -> fx.Node:
    """Register ``tensor`` on the graph's module and return its ``get_attr`` node (at the current insertion point)."""
    module = graph.owning_module
    assert module is not None
    index = 0
    while hasattr(module, f"{stem}_{index}"):
        index += 1
    name = f"{stem}_{index}"
    module.register_buffer(name, tensor)
    sources = getattr(module, "_param_name_to_source", None)
    if sources is not None:  # AOTAutograd asserts that every tensor of a Dynamo graph has a source
        sources[name] = ConstantSource(name)
    node = graph.get_attr(name)
    node.meta["example_value"] = tensor
    return node


def detach_unused(graph: fx.Graph) -> None:
    """Erase get_attr nodes without users, and the tensors that no node names any more."""
    module = graph.owning_module
    assert module is not None
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    named = {node.target for node in graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in module.named_buffers() if name.startswith("qpass_") and name not in named]:
        delattr(module, name)
        getattr(module, "_param_name_to_source", {}).pop(name, None)
