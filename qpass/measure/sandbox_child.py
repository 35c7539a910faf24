"""The inside of the sandbox: confines this process, runs one program, reports through a pipe. Standard library only.

Started by :mod:`qpass.measure.sandbox` as a script, with a request of JSON on stdin. What this kernel or container
doesn't permit is reported by name, not skipped silently.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import sys
import time

LIBC = ctypes.CDLL(None, use_errno=True)
NAMESPACES = {"user": 0x10000000, "mount": 0x00020000, "network": 0x40000000, "ipc": 0x08000000, "process": 0x20000000}
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 1, 2, 4, 0x4000, 0x40000
SYS_MOUNT_SETATTR, SYS_CAPSET, AT_RECURSIVE = 442, 126, 0x8000

FORBIDDEN = {
    "sockets": (41, 42, 43, 44, 46, 49, 50, 53, 288),
    "new processes and threads": (56, 57, 58, 59, 322, 435),
    "signals to others": (62, 129, 200, 234, 297, 424, 434, 438),
    "sessions and groups": (109, 112),
    "other processes' memory": (101, 310, 311, 312),
    "namespaces and mounts": (155, 161, 165, 166, 272, 308, 428, 429, 430, 431, 432, 433, 442),
    "kernel interfaces with a history": (248, 249, 250, 298, 321, 323, 425),
    "memory outside of this process": (29, 64, 68, 240, 319, 447),
}
"""System calls of x86-64 by number; they fail with EPERM."""


def checked(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def enter_namespaces() -> None:
    """An empty network, processes and mounts of its own. Raises OSError where that isn't permitted."""
    uid, gid = os.getuid(), os.getgid()
    checked(LIBC.unshare(sum(NAMESPACES.values())), "namespaces")
    with open("/proc/self/setgroups", "w") as file:
        file.write("deny")
    for name, own in (("uid_map", uid), ("gid_map", gid)):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(f"65534 {own} 1")


def mount(kind: bytes, target: str, flags: int, data: bytes = b"") -> None:
    checked(LIBC.mount(b"none", os.fsencode(target), kind, ctypes.c_ulong(flags), data), f"mounting {target}")


def seal_files(folder: str, disk_bytes: int) -> None:
    """Every file system read-only, /proc hidden, and ``folder`` a memory disk of so many bytes that dies with us."""
    mount(b"", "/", MS_REC | MS_PRIVATE)
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID, 0, 0, 0)  # MOUNT_ATTR_* have these flags' values
    checked(LIBC.syscall(SYS_MOUNT_SETATTR, -100, b"/", AT_RECURSIVE, attributes, 32), "read-only mounts")
    mount(b"tmpfs", "/proc", MS_RDONLY | MS_NOSUID | MS_NODEV, b"size=4k")
    mount(b"tmpfs", folder, MS_NOSUID | MS_NODEV, f"size={disk_bytes},nr_inodes=256,mode=700".encode())


def drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    checked(LIBC.syscall(SYS_CAPSET, header, (ctypes.c_uint32 * 6)()), "dropping capabilities")


def forbid_calls() -> None:
    """A seccomp filter (linux/filter.h). Raises OSError where the machine has none."""
    if platform.machine() != "x86_64":
        raise OSError(f"the system call filter is written for x86-64, not {platform.machine()}")
    numbers = sorted(n for group in FORBIDDEN.values() for n in group)
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    code = [
        (load, 0, 0, 4),
        (equal, 1, 0, 0xC000003E),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, len(numbers) + 1, 0, 1 << 30),
    ]
    code += [(equal, len(numbers) - i, 0, n) for i, n in enumerate(numbers)]
    code += [(give, 0, 0, allow), (give, 0, 0, refuse)]

    class Instruction(ctypes.Structure):
        _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_uint16), ("code", ctypes.POINTER(Instruction)))

    program = Program(len(code), (Instruction * len(code))(*(Instruction(*each) for each in code)))
    checked(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    checked(LIBC.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "the system call filter")


def limit(request: dict) -> None:
    megabyte = 1 << 20
    for name, most in {
        "RLIMIT_CPU": int(request["seconds"]) + 1,
        "RLIMIT_AS": request["memory_mb"] * megabyte,
        "RLIMIT_DATA": request["memory_mb"] * megabyte,
        "RLIMIT_FSIZE": request["file_mb"] * megabyte,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 1,  # for all but root, whom the filter stops
        "RLIMIT_CORE": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_MEMLOCK": 0,
    }.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            resource.setrlimit(kind, (most, most))


def block_sockets() -> None:
    """Where the kernel won't: Python's own way to a socket is gone. It keeps nobody out who tries."""
    for name in ("socket", "_socket", "ssl", "_ssl", "asyncio", "subprocess", "_posixsubprocess", "multiprocessing"):
        sys.modules[name] = None  # type: ignore[assignment]
    for name in (
        "fork",
        "forkpty",
        "system",
        "kill",
        "killpg",
        "execv",
        "execve",
        "posix_spawn",
        "posix_spawnp",
        "setsid",
    ):
        setattr(os, name, None)


def confine(request: dict) -> list:
    """Everything that this machine permits; returns what it didn't, a sentence each. Forks: the caller is the child."""
    missing = []
    try:
        enter_namespaces()
    except OSError as error:
        missing.append(f"no namespaces ({error.strerror or error})")
    watch(request["seconds"])
    if not missing:
        try:
            seal_files(request["folder"], request["disk_mb"] << 20)
        except OSError as error:
            missing.append(f"files are not read-only ({error.strerror or error})")
    os.chdir(request["folder"])
    limit(request)
    for step in (drop_capabilities, forbid_calls):
        try:
            step()
        except OSError as error:
            missing.append(f"no {step.__name__.replace('_', ' ')} ({error.strerror or error})")
    if any("calls" in each for each in missing):
        block_sockets()
    return missing


def watch(seconds: float) -> None:
    """Fork; the child returns. The parent outlives it: it kills it at the deadline, and with it all that it started,
    for the child is the first process of its namespace."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() not in (0, parent):
            os._exit(1)
        return
    until, ended, status = time.monotonic() + seconds, 0, 0
    while not ended and time.monotonic() < until:
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.set_blocking(1, False)
    if not ended or status in (signal.SIGKILL, signal.SIGXCPU):  # ours, or that of the limit on CPU time
        report(1, late=True)
    elif status:
        report(1, failed=f"ended by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else "ended")
    os._exit(0)


def report(pipe: int, **what: object) -> None:
    with contextlib.suppress(OSError):
        os.write(pipe, json.dumps(what).encode() + b"\n")


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    missing = confine(request)
    pipe = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(silence, number)
    report(pipe, missing=missing)
    program, secret = request.pop("program"), request.pop("secret")
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # SystemExit too: the end of the program is behind it
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        report(pipe, failed=text[:300])
    else:
        report(pipe, secret=secret)
    os._exit(0)  # nothing that the program registered runs


if __name__ == "__main__":
    main()
