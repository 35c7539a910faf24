"""qpass serve: transformers' server with an artefact behind it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpass
from qpass.errors import OptionError
from qpass.frontends.commands.serve import serve


def _ask(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://localhost:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "qpass.frontends.cli", "serve", str(folder), "--port", str(port)]
    with (folder.parent / "log").open("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            end = time.monotonic() + 120
            while time.monotonic() < end:
                with contextlib.suppress(OSError):
                    _ask(port, "/health")
                    break
                assert server.poll() is None, (folder.parent / "log").read_text()[-2000:]
                time.sleep(0.3)
            yield port
        finally:
            server.terminate()


def test_an_artefact_is_served(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "smaller"
    config = qpass.QPassConfig(scheme="w4a16-g32")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.save_pretrained(folder)
    prompt = "the answer is"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    with _served(folder) as port:
        found = _ask(
            port,
            "/v1/completions",
            {"model": str(folder), "prompt": prompt, "max_tokens": 8, "temperature": 0, "stream": False},
        )
    assert found["choices"][0]["text"] == tokenizer.decode(out, skip_special_tokens=True)


def test_without_the_server_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(OptionError, match=r"pip install 'qpass\[serve\]'"):
        serve("anything", [])
