"""What a reader makes of one linear layer: its format at once, its codes from the mapped file when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.checkpoints.validate import TensorInfo, refuse
from qpass.qweight import QWeight
from qpass.scheme import GROUPS, Activation, Format


@dataclass(frozen=True, eq=False)
class StoredLinear:
    """One linear layer [N, K] as a checkpoint has it. What it read is checked: :attr:`read` can't fail.

    read        the codes, anew each time: a byte a code for a whole model would be twice what four bits need
    divisor     fp32 [K] or None: the codes multiply x / divisor
    order       int64 [K] or None: column j of the codes multiplies x[..., order[j]]
    activation  how activations meet the codes, where the checkpoint says so
    source      who found the codes, for people
    origin      names the bytes that :attr:`read` reads and how it reads them; None where they are in no file
    """

    format: Format
    shape: tuple[int, int]
    read: Callable[[], QWeight]
    divisor: Tensor | None = None
    order: Tensor | None = None
    activation: Activation | None = None
    source: str = ""
    origin: str | None = None


def stored_group(info: TensorInfo, group: int, k: int) -> tuple[int | None, int]:
    """A checkpoint's group (K or more, or -1: per channel) as one of ours, and into how many of ours it is divided.

    A longer group is several of 128 that share their scale and zero. Raises CheckpointError, which names ``info``, for
    one that our formats can't hold.
    """
    if group == -1 or group >= k:
        return None, 1
    if group in GROUPS:
        return group, 1
    if group < 1 or group % GROUPS[-1]:
        accepted = ", ".join(map(str, GROUPS))
        refuse(info.file, info.name, f"has groups of {group}; accepted: {accepted} and multiples of the last")
    return GROUPS[-1], group // GROUPS[-1]


def divided(per_group: Tensor, parts: int, groups: int) -> Tensor:
    """Scales or zeros [N, G] of long groups as those of the ``groups`` shorter ones inside of them."""
    return per_group.repeat_interleave(parts, dim=1)[:, :groups] if parts > 1 else per_group


def order_of(info: TensorInfo, g_idx: Tensor, group: int, groups: int) -> Tensor | None:
    """The order [K] that brings the columns of each group together, None where they are already.

    ``g_idx`` [K] names each column's group. Raises CheckpointError for a group that isn't there, and for one that has
    not exactly ``group`` columns (the last may have fewer): our kernels give each run of columns one scale.
    """
    g_idx, k = g_idx.long(), g_idx.numel()
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        refuse(info.file, info.name, f"names group {low if low < 0 else high}, where there are {groups}")
    sizes = torch.bincount(g_idx, minlength=groups)
    expected = torch.full_like(sizes, group)
    expected[-1] = k - group * (groups - 1)
    if not torch.equal(sizes, expected):
        wrong = int((sizes != expected).nonzero()[0])
        refuse(
            info.file,
            info.name,
            f"gives group {wrong} {int(sizes[wrong])} columns, where it has {int(expected[wrong])}",
        )
    order = torch.argsort(g_idx, stable=True)
    return None if torch.equal(order, torch.arange(k)) else order
