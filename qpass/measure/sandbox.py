"""Run a program that nobody has read: no network, little time, memory and disk, and nothing left behind.

Linux namespaces (an empty network, processes and read-only mounts of its own), a seccomp filter (no sockets, no new
processes, no signals to others), resource limits, an empty environment, and a wall-clock deadline that kills the whole
process group. The program shares its interpreter with its own tests, as in HumanEval: one that sets out to forge its
verdict can; what it can't do is hurt the machine, or pass by ending early.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from qpass.errors import UnsupportedError

_CHILD = Path(__file__).with_name("sandbox_child.py")

_REPORT_BYTES = 1 << 14
"""The most that is read of what the other side says."""

_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""All that the program sees: equal hashes in every run, and libraries that start no threads."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. ``seconds`` are wall clock; CPU time gets a second more."""

    seconds: float = 5.0
    memory_mb: int = 1024
    file_mb: int = 1
    disk_mb: int = 16


@dataclass(frozen=True)
class Verdict:
    """``passed``: the program ran to its end. ``missing``: what the machine didn't permit of the sandbox."""

    passed: bool
    result: str  # "passed", "timed out", "ended early" or "failed: ..."
    missing: tuple[str, ...] = ()


def execute(program: str, limits: Limits | None = None) -> Verdict:
    """Run Python source in a sandbox of its own. Never raises for what the program does."""
    limits = limits or Limits()
    folder = tempfile.mkdtemp(prefix="qpass-sandbox-")
    secret = secrets.token_hex(16)  # an exit code or a file could be forged by accident
    request = {"program": program, "secret": secret, "folder": folder, **asdict(limits)}
    child = subprocess.Popen(
        [sys.executable, "-B", "-P", "-s", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_ENVIRONMENT,
        cwd=folder,
        start_new_session=True,
        close_fds=True,
    )
    try:
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(request).encode())
            child.stdin.close()
        except OSError:  # it died already: the report says so
            pass
        # The other side has the same deadline, behind its start; this one is for what gets past that.
        said, ended = _listen(child, limits.seconds + 10)
    finally:
        _kill(child)
        _remove(folder)
    return _judge(said, ended, secret)


def check(limits: Limits | None = None) -> tuple[str, ...]:
    """What this machine does not permit of the sandbox, a sentence each; () where it is whole.

    Raises UnsupportedError where even a good program doesn't pass: every verdict would be wrong.
    """
    verdict = execute("import math, re, typing\nassert math.sqrt(4) == 2", limits)
    if not verdict.passed:
        raise UnsupportedError(f"the sandbox does not run Python here: {verdict.result}")
    return verdict.missing


def _listen(child: subprocess.Popen[bytes], seconds: float) -> tuple[bytes, bool]:
    """What comes out of the pipe until it is closed, the deadline, or too much; and whether it was closed."""
    assert child.stdout is not None
    until, said = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0 and len(said) < _REPORT_BYTES:
            if selector.select(left):
                part = os.read(child.stdout.fileno(), _REPORT_BYTES)
                if not part:
                    return said, True
                said += part
    return said, False


def _judge(said: bytes, ended: bool, secret: str) -> Verdict:
    missing: tuple[str, ...] = ()
    result = "ended early" if ended else "timed out"
    for line in said.splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if not isinstance(told, dict):
            continue
        if "missing" in told:
            missing = tuple(map(str, told["missing"]))
        elif told.get("secret") == secret:
            result = "passed"
        elif "late" in told:
            result = "timed out"
        elif "failed" in told:
            result = f"failed: {told['failed']}"
    return Verdict(result == "passed", result, missing)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The child's whole process group, whether it ended or not."""
    try:
        os.killpg(child.pid, signal.SIGKILL)  # its session's first process: its group has its number
    except (ProcessLookupError, PermissionError):
        child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


def _remove(folder: str) -> None:
    """Also what was made unreadable."""
    os.chmod(folder, 0o700)
    for parent, names, _ in os.walk(folder):  # top down: each is readable before it is entered
        for path in (os.path.join(parent, name) for name in names):
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
