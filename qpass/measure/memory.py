"""How much memory this process holds now, and how much it held at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Resident memory now; where the system doesn't say, the most there has been."""
    return _status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """The most resident memory since the process began, or since :func:`reset_peak` where that worked."""
    found = _status("VmHWM")
    if found is not None:
        return found
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak() -> bool:
    """Let the peak start again from now; False where the system doesn't permit it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    """A line of /proc/self/status in bytes, None where there is no such file."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, rest = line.partition(":")
        if key == name:
            return int(rest.split()[0]) * 1024
    return None
