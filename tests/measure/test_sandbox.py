"""Hostile programs: none passes, none outlives its deadline, none touches what is outside."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from qpass.measure.sandbox import Limits, check, execute

QUICK = Limits(seconds=1.0, memory_mb=256)


@pytest.fixture(scope="module")
def whole():
    return check(QUICK) == ()


def needs(whole):
    if not whole:
        pytest.skip("this machine does not permit a whole sandbox")


def test_a_good_program_passes_and_a_wrong_one_says_why():
    assert execute("import json, hashlib, collections\nassert 1 + 1 == 2", QUICK).result == "passed"
    verdict = execute("assert 1 + 1 == 3, 'three'", QUICK)
    assert (verdict.passed, verdict.result) == (False, "failed: AssertionError: three")
    assert execute("def f(:\n  pass", QUICK).result.startswith("failed: SyntaxError")


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import os, signal; os.abort()",
        "import ctypes; ctypes.string_at(0)",
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
        "import atexit, os\nos._exit(0)",
        "raise KeyboardInterrupt",
        "class E(BaseException):\n  def __str__(self): import os; os._exit(0)\nraise E",
    ],
)
def test_ending_early_is_no_pass(program):
    verdict = execute(program + "\nassert False", QUICK)
    assert not verdict.passed


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "try:\n  while True: pass\nexcept BaseException:\n  while True: pass",
        "import signal\nfor n in range(1, 64):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\nwhile True: pass",
    ],
    ids=["busy", "asleep", "stubborn", "deaf"],
)
def test_what_does_not_end_is_ended(program):
    started = time.monotonic()
    assert execute(program, QUICK).result == "timed out"
    assert time.monotonic() - started < 5


def test_a_fork_bomb_leaves_nothing(whole):
    mark = f"qpass-bomb-{os.getpid()}"
    program = f"import os, ctypes\nctypes.CDLL(None).prctl(15, b'{mark[:15]}', 0, 0, 0)\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    assert not execute(program, QUICK).passed
    assert mark[:15] not in {_name(pid) for pid in pathlib.Path("/proc").glob("[0-9]*")}
    needs(whole)
    assert execute("import os\nos.fork()", QUICK).result.startswith("failed: PermissionError")
    assert "PermissionError" in execute("import subprocess\nsubprocess.run(['/bin/true'])", QUICK).result
    assert "can't start new thread" in execute("import threading\nthreading.Thread().start()", QUICK).result


def _name(process):
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return ""


def test_memory_is_bounded():
    assert execute("x = bytearray(1 << 30)", QUICK).result == "failed: MemoryError"
    assert not execute("x = []\nwhile True: x.append(bytearray(1 << 20))", QUICK).passed
    assert not execute("x = 1\nwhile True: x = x << (1 << 24)", QUICK).passed


def test_files_are_bounded_and_gone_afterwards(tmp_path, whole):
    before = set(pathlib.Path(tempfile.gettempdir()).glob("qpass-sandbox-*"))
    assert execute("open('small', 'w').write('x' * 1000)", QUICK).passed
    verdict = execute("open('large', 'w').write('x' * (1 << 22))", QUICK)
    assert "File too large" in verdict.result
    nested = "import os\nos.mkdir('a')\nopen('a/b', 'w').close()\nos.symlink('/', 'a/root')\nos.chmod('a', 0)"
    assert execute(nested, QUICK).passed
    assert set(pathlib.Path(tempfile.gettempdir()).glob("qpass-sandbox-*")) == before
    needs(whole)
    many = "for i in range(30): open(str(i), 'w').write('x' * (1 << 20))"
    assert "No space left" in execute(many, QUICK).result
    kept = tmp_path / "kept"
    kept.write_text("mine")
    for harm in (f"open({str(kept)!r}, 'w')", f"import os; os.remove({str(kept)!r})", "open('/dev/shm/x', 'w')"):
        assert "Read-only file system" in execute(harm, QUICK).result
    assert kept.read_text() == "mine"
    assert execute("import os\nassert os.listdir('/proc') == []", QUICK).passed


def test_there_is_no_network(whole):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        verdict = execute(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)", QUICK)
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert not verdict.passed
    needs(whole)
    assert "Operation not permitted" in verdict.result
    assert "PermissionError" in execute("import socket\nsocket.socketpair()", QUICK).result


def test_floods_of_output_are_dropped():
    flood = "import sys, os\nfor i in range(200):\n  print('x' * 100000); sys.stderr.write('y' * 100000)"
    assert execute(flood, Limits(seconds=5)).passed
    pipes = "import os\nwhile True:\n  for fd in range(3, 64):\n    try: os.write(fd, b'z' * 4096)\n    except OSError: pass"
    started = time.monotonic()
    assert not execute(pipes, QUICK).passed
    assert time.monotonic() - started < 5


def test_nobody_else_is_killed(whole):
    needs(whole)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for victim in ("os.getppid()", "-1", "1", "0", str(os.getpid()), str(bystander.pid)):
            execute(f"import os, signal\nos.kill({victim}, signal.SIGKILL)", QUICK)
            execute(f"import os, signal\nos.killpg({victim}, signal.SIGKILL)", QUICK)
        assert bystander.poll() is None
    finally:
        bystander.send_signal(signal.SIGKILL)
        bystander.wait()


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("QPASS_SECRET", "password")
    program = "import os\nassert 'QPASS_SECRET' not in os.environ and 'HOME' not in os.environ, dict(os.environ)"
    assert execute(program, QUICK).result == "passed"
    assert execute("input()", QUICK).result.startswith("failed: EOFError")


def test_lying_on_the_pipe_is_no_pass():
    lie = 'import os\nfor fd in range(3, 64):\n  try: os.write(fd, b\'{"secret": "guess"}\\n{"passed": true}\\n\')\n  except OSError: pass\nos._exit(0)'
    assert not execute(lie, QUICK).passed


def test_without_namespaces_and_filter_it_says_so(monkeypatch, tmp_path):
    """A machine that permits neither: sockets and processes are still gone for a program that takes no pains."""
    from qpass.measure import sandbox

    source = sandbox._CHILD.read_text().replace('"x86_64"', '"vax"').replace("LIBC.unshare(", "LIBC.prctl(-1, ")
    child = tmp_path / "child.py"
    child.write_text(source)
    monkeypatch.setattr(sandbox, "_CHILD", child)
    missing = check(QUICK)
    assert any("no namespaces" in each for each in missing)
    assert any("no forbid calls" in each for each in missing)
    assert "import of socket halted" in execute("import socket", QUICK).result
    assert execute("while True: pass", QUICK).result == "timed out"
    assert not execute("import os\nos.fork()", QUICK).passed
