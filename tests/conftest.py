"""What every folder may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a thread a worker: OpenMP's threads spin, and would hold each other up
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as ``qpass demo`` fetches it, written as a folder that ``from_pretrained`` reads."""
    from qpass.frontends.demo_model import demo_model_path
    from qpass.frontends.hf import load

    folder = tmp_path_factory.mktemp("smollm2")
    loaded = load(demo_model_path(), codes=False)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers, whichever ran before it."""
    import torch

    torch.manual_seed(0)
