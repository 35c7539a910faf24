"""Who can run a quantized linear on this machine: the lowerings, in order of preference, and the choice among them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, fx

from qpass.cpu import Cpu
from qpass.errors import OptionError, UnsupportedError
from qpass.lowering.aten import Aten
from qpass.lowering.generated import Generated
from qpass.lowering.onednn import OneDNN
from qpass.lowering.reference import Reference
from qpass.lowering.site import ANY, Site
from qpass.qweight import QWeight


class Lowering(Protocol):
    name: str
    portable: bool  # packed weights are plain bytes of a layout of ours, good for another process

    def same_rows(self, site: Site, cpu: Cpu) -> int:
        """Up to how many rows at once a row's result has the same bits as alone: 0 for no promise, :data:`ANY`."""

    def refuse(self, site: Site, cpu: Cpu) -> str | None:
        """None when it can run the site; otherwise one sentence that explain prints."""

    def pack(self, weight: QWeight, *, glu: bool) -> tuple[Tensor, ...]:
        """The weight in this lowering's own layout."""

    def emit(self, graph: fx.Graph, node: fx.Node, packed: tuple[fx.Node, ...]) -> fx.Node:
        """Put this lowering's nodes before ``node`` (a quantized_linear) and return the one that replaces it.

        ``node.meta["qpass_scheme"]`` says what the tensors alone don't: that scales are integers.
        """


ORDER: tuple[Lowering, ...] = (
    Generated(),  # kernels made for this CPU: any M at the machine's limit
    OneDNN(),  # int8 x int8 where no compiler is at hand
    Aten(),  # torch's own weight-only kernels: bf16, few formats, slow above M = 4
    Reference(),  # plain torch over the codes: always right, never fast
)


def by_name(name: str) -> Lowering:
    for lowering in ORDER:
        if lowering.name == name:
            return lowering
    raise OptionError(f"unknown lowering {name!r}; accepted: {', '.join(lowering.name for lowering in ORDER)}")


def choose(site: Site, cpu: Cpu, wanted: str | None = None) -> tuple[Lowering, tuple[str, ...]]:
    """The first lowering that takes the site, and the refusals of those before it.

    ``wanted`` names the only one to ask; its refusal is an UnsupportedError, since the request was explicit.
    """
    refusals: list[str] = []
    for lowering in ORDER if wanted is None else (by_name(wanted),):
        reason = lowering.refuse(site, cpu)
        if reason is None:
            return lowering, tuple(refusals)
        refusals.append(f"{lowering.name}: {reason}")
    raise UnsupportedError(f"{site.name} [{site.n}, {site.k}] {site.scheme}: {'; '.join(refusals)}")


__all__ = ["ANY", "ORDER", "Lowering", "Site", "by_name", "choose"]
