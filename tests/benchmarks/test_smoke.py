"""The benchmark suites run: a case of each on a tiny model, with the extra facts that they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_case_of_each_suite(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-enable",
        "-o",
        "python_files=bench_*.py",
        "--smoke",
    ]
    done = subprocess.run(
        [*command, f"--benchmark-json={tmp_path / 'b.json'}", "-p", "no:cacheprovider", "--durations=5"],
        cwd=ROOT, capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if "XDIST" not in name},  # a worker times nothing
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = {b["name"]: b["extra_info"] for b in json.loads((tmp_path / "b.json").read_text())["benchmarks"]}
    assert set(found) == {
        "test_linear[w4a8-g128-1536to8960-5]",
        "test_attention[smollm2-135m-1-512-qpass]",
        "test_token[stock]",
        "test_prompt[stock-128]",
        "test_verification[stock-1]",
        "test_load",
    }
    assert found["test_token[stock]"]["read_bytes"] > 100_000
    assert 0 < found["test_token[stock]"]["share_of_limit"] < 1
    assert 0 < found["test_prompt[stock-128]"]["share_of_limit"] < 1
    assert found["test_linear[w4a8-g128-1536to8960-5]"]["weight_bytes"] > 6_000_000
    assert found["test_load"]["bytes"] > 100_000
