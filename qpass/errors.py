"""The errors that qpass raises; each message names the culprit and what is accepted."""

from __future__ import annotations


class QpassError(RuntimeError):
    """The root of all of them."""


def raise_ours(error: Exception) -> None:
    """Raise the error of ours that Dynamo wrapped in its own, as it does with what a backend raises, if there is one."""
    own = getattr(error, "inner_exception", error)
    if isinstance(own, QpassError):
        raise own from error


class SchemeError(QpassError, ValueError):
    """A scheme's name or a choice of schemes that cannot be read."""


class OptionError(QpassError, ValueError):
    """An unknown option, a wrong value, or a module pattern that matches nothing."""


class UnsupportedError(QpassError):
    """An explicit request that cannot be served: training, another device, a dtype, a lowering that refuses."""


class KernelError(QpassError):
    """A kernel could not be built, found or trusted."""


class ReleasedWeightError(QpassError):
    """Eager use of a weight whose full-precision data was released."""


class CheckpointError(QpassError):
    """A file that is not what it claims to be."""
