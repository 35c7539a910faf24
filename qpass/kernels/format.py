"""KernelFormat: what one kernel unit is compiled for, and the size of the weights that it reads (``cpp/layout.h``)."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 64
"""Outputs of a block of the packed weight."""

BITS = (4, 8, 2, 3)
GROUPS = (None, 32, 64, 128, 16)
RULES = ("a16", "a8-token", "a8-token-group", "a8-static")
"""Each in the order of its numbers, which never change: new values come behind."""

NUMBERS = 1024


@dataclass(frozen=True)
class KernelFormat:
    """``bits`` of a code, ``group`` (None: per channel), the activation ``rule``, and the bytes of a stored scale and zero.

    A zero is a code (1 byte) or any fp32 number (4). A scale of 1 byte, which it shares with its zero, is a whole multiple of
    its output's own fp32 scale.
    Its ``number`` means the same in every process. Raises ValueError for a combination that no kernel has.
    """

    bits: int
    group: int | None
    rule: str
    scale_bytes: int = 4
    zero_bytes: int = 1

    def __post_init__(self) -> None:
        if (
            self.bits not in BITS
            or self.group not in GROUPS
            or self.rule not in RULES
            or self.scale_bytes not in (1, 2, 4)
            or self.zero_bytes not in (1, 4)
        ):
            raise ValueError(f"no kernel has {self}")
        if self.group is None and self.rule == "a8-token-group":
            raise ValueError("without weight groups, activations have one scale a token: a8-token")
        if self.integer_scales and (
            self.bits == 8 or self.group is None or self.rule not in ("a8-token", "a8-static") or self.zero_bytes != 1
        ):
            raise ValueError(
                f"no kernel has {self}: integer scales are for groups of 2 to 4 bits and one scale a token"
            )

    @property
    def integer_scales(self) -> bool:
        return self.scale_bytes == 1

    @property
    def folds_once(self) -> bool:
        """Whether sums run from the first input to the last, and meet one scale an output there."""
        return self.group is None or self.integer_scales

    @property
    def number(self) -> int:
        """Bits 0 and 7: bits; 1, 2 and 6: group; 3 and 4: rule; 5: fp32 scales; 8: fp32 zeros; 9: integer scales."""
        bits, group, rule = BITS.index(self.bits), GROUPS.index(self.group), RULES.index(self.rule)
        low = bits & 1 | (group & 3) << 1 | rule << 3 | (self.scale_bytes == 4) << 5
        high = (group >> 2) << 6 | (bits >> 1) << 7 | (self.zero_bytes == 4) << 8 | self.integer_scales << 9
        return low | high

    @classmethod
    def of(cls, number: int) -> KernelFormat:
        """The format behind a number. Raises ValueError for one that means nothing."""
        group = number >> 1 & 3 | (number >> 6 & 1) << 2
        if not 0 <= number < NUMBERS or group >= len(GROUPS):
            raise ValueError(f"{number} is no format")
        bits = BITS[number & 1 | (number >> 7 & 1) << 1]
        try:
            scale = {0: 2, 1: 4, 2: 1}.get((number >> 9) * 2 + (number >> 5 & 1), 0)
            return cls(bits, GROUPS[group], RULES[number >> 3 & 3], scale, 4 if number >> 8 & 1 else 1)
        except ValueError as error:
            raise ValueError(f"{number} is no format: {error}") from None

    @property
    def name(self) -> str:
        group = f"g{self.group}" if self.group else "channel"
        scales = "int" if self.integer_scales else f"f{8 * self.scale_bytes}"
        return f"w{self.bits}-{group}-{self.rule}-{scales}" + ("-fz" if self.zero_bytes == 4 else "")

    @property
    def chunk(self) -> int:
        """Inputs whose codes lie together."""
        return min(self.group or BLOCK, BLOCK)

    @property
    def unpacks(self) -> bool:
        """Whether codes are not yet what the dot products take; 8-bit ones times int8 activations are."""
        return self.bits != 8 or self.rule == "a16"

    def padded_k(self, k: int) -> int:
        length = self.group if self.group and not self.integer_scales else BLOCK
        return -(-k // length) * length

    def groups(self, k: int) -> int:
        return 1 if self.group is None else -(-k // self.group)

    def blocks(self, n: int, glu: bool) -> int:
        return 2 * -(-(n // 2) // BLOCK) if glu else -(-n // BLOCK)

    def packed_bytes(self, n: int, k: int, glu: bool = False) -> int:
        """Length of the packed weight: per block and group the codes, 64 scales and 64 zeros (``cpp/layout.h``)."""
        codes = BLOCK * self.padded_k(k) * self.bits // 8
        if self.integer_scales:
            return self.blocks(n, glu) * (codes + BLOCK * (self.padded_k(k) // self.chunk + 5))
        return self.blocks(n, glu) * (codes + self.groups(k) * BLOCK * (self.scale_bytes + self.zero_bytes))
