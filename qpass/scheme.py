"""What is stored: bits, groups, symmetry, and how activations meet the weights.

The one formula of the project, used by every algorithm, op, lowering and kernel:

    w = (codes - zeros) * scales
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qpass.errors import SchemeError

Activation = Literal["a16", "a8-token", "a8-token-group", "a8-static"]
"""As they are; int8 with a scale a token, a scale a token and weight group, or one scale for all that calibration found."""

BITS = (2, 3, 4, 8)

GROUPS = (16, 32, 64, 128)
"""Group lengths along K that the grouped formats accept."""


@dataclass(frozen=True)
class Format:
    """How one weight matrix is stored.

    ``group`` is the number of consecutive inputs (along K) that share a scale and a zero; ``None`` means one per
    output channel. A symmetric format fixes every zero at ``2 ** (bits - 1)``. Zeros are codes unless ``float_zeros``
    says that they may be any number: then ``w = d * code + m`` is held too, as ``zero = -m / d``.

    ``integer_scales``: a group's scale is a whole multiple, 1 to 15, of one scale a row, and ``(code - zero) * multiple`` a
    signed byte, so that int8 products need no scale before the last input (2405.14597; the bytes are QServe's, 2405.04532).
    """

    bits: int
    group: int | None = None
    symmetric: bool = False
    float_zeros: bool = False
    integer_scales: bool = False

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    def groups_of(self, k: int) -> int:
        """Number of scales per output channel for K inputs; the last group may be short."""
        return 1 if self.group is None else -(-k // self.group)

    @property
    def token_rule(self) -> Activation:
        """How int8 activations get scales as they come: where a group ends its sum, one a group is as cheap as one a token."""
        return "a8-token" if self.group is None or self.integer_scales else "a8-token-group"


@dataclass(frozen=True)
class Scheme:
    """A weight format and an activation rule under one name. ``weight is None`` leaves the layer as it is.

    ``outliers``: the few inputs that calibration found far larger than the rest stay in 16 bits, with their columns of the
    weight (LLM.int8, arXiv 2208.07339).
    """

    name: str
    weight: Format | None
    activation: Activation
    outliers: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def quantizes(self) -> bool:
        return self.weight is not None

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration must have seen the layer's input."""
        return self.activation == "a8-static" or self.outliers

    @classmethod
    def of(cls, weight: Format, activation: Activation) -> Scheme:
        """The scheme of weights in this format whose activations are int8 or not as ``activation`` says."""
        int8 = activation != "a16"
        name = f"w{weight.bits}a{8 if int8 else 16}" + (f"-g{weight.group}" if weight.group else "")
        if weight.symmetric != (weight.bits == 8):
            name += "-sym" if weight.symmetric else "-asym"
        if weight.float_zeros:
            name += "-floatzero"
        if weight.integer_scales:
            name += "-intscale"
        if activation == "a8-static":
            return cls(f"{name}-static", weight, activation)
        if int8 and weight == Format(8, None, True):
            name += "-dynamic"
        return cls(name, weight, weight.token_rule if int8 else "a16")

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """Read a scheme's name: ``w<bits>a<16|8>[-g<group>][-sym|-asym][-floatzero|-intscale][-dynamic|-static|-outlier]``.

        Int8 is symmetric, fewer bits are asymmetric unless the name says otherwise. Raises :class:`SchemeError`, which
        names what is accepted.
        """
        if not isinstance(name, str):
            raise SchemeError(f"a scheme is named by a string such as 'w4a16-g128', not {type(name).__name__}")
        match = _NAME.fullmatch(name)
        if match is None:
            raise SchemeError(f"unknown scheme {name!r}; accepted: {ACCEPTED}")
        bits, act = int(match["w"]), int(match["a"])
        group = int(match["g"]) if match["g"] else None
        how, symmetry, special = match["how"], match["sym"], match["special"]
        float_zeros, integer_scales = special == "floatzero", special == "intscale"
        if (bits, act) == (16, 16) and group is None and not (symmetry or how or special):
            return cls(name, None, "a16")
        if bits not in BITS or act not in (8, 16):
            raise SchemeError(f"unknown scheme {name!r}; accepted: {ACCEPTED}")
        if group is not None and group not in GROUPS:
            raise SchemeError(f"scheme {name!r}: group {group} is not one of {', '.join(map(str, GROUPS))}")
        if how and act != 8:
            raise SchemeError(f"scheme {name!r}: {how!r} speaks of int8 activations; accepted: {ACCEPTED}")
        if integer_scales and (act != 8 or bits == 8 or group is None):
            raise SchemeError(
                f"scheme {name!r}: integer scales are for groups of 2 to 4 bits and int8 activations, "
                f"as in w4a8-g128-intscale; accepted: {ACCEPTED}"
            )
        if how == "outlier" and (bits, group, symmetry, special) != (8, None, None, None):
            raise SchemeError(f"scheme {name!r}: outliers are kept apart in w8a8-outlier only; accepted: {ACCEPTED}")
        if float_zeros and symmetry == "sym":
            raise SchemeError(f"scheme {name!r}: a symmetric format has no zeros of its own, so no 'floatzero'")
        symmetric = symmetry == "sym" if symmetry else bits == 8 and not float_zeros
        format = Format(bits, group, symmetric, float_zeros, integer_scales)
        if how == "static":
            return cls(name, format, "a8-static")
        return cls(name, format, "a16" if act == 16 else format.token_rule, outliers=how == "outlier")


_NAME = re.compile(
    r"w(?P<w>\d+)a(?P<a>\d+)(?:-g(?P<g>\d+))?(?:-(?P<sym>sym|asym))?(?:-(?P<special>floatzero|intscale))?"
    r"(?:-(?P<how>dynamic|static|outlier))?"
)

ACCEPTED = (
    "w16a16, w8a16, w8a8-dynamic, w<2|3|4>a<16|8>, w<2|3|4|8>a<16|8>-g<16|32|64|128>, each with -sym or -asym behind it "
    "where it should differ from the default (int8 symmetric, fewer bits asymmetric), or -floatzero for zeros that are no "
    "codes, or -intscale for group scales that are whole multiples of one a row (2 to 4 bits with int8 activations), and with -static behind that where int8 activations should have one scale from calibration; w8a8-outlier"
)

SCHEMES: dict[str, Scheme] = {
    name: Scheme.parse(name)
    for name in (
        "w16a16",
        "w8a16",
        "w8a8-dynamic",
        "w8a8-static",
        "w8a8-outlier",
        "w4a16-g32",
        "w4a16-g64",
        "w4a16-g128",
        "w4a8-g32",
        "w4a8-g64",
        "w4a8-g128",
        "w4a8-g128-intscale",
        "w3a16-g64",
        "w2a16-g32",
    )
}
"""The schemes that the documentation names; :meth:`Scheme.parse` reads their whole family."""

DEFAULT_SCHEME = "w8a16"
HEAD_SCHEME = "w8a16"
"""What the output head gets by default in every scheme below eight bits: four bits there cost as much perplexity as
half of the rest of the model, eight cost nothing."""
