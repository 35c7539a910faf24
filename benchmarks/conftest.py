"""What the suites share: the model that they run, and a smoke mode that runs a little of each in seconds.

pytest benchmarks --benchmark-enable -o python_files='bench_*.py' [--model FOLDER] [--benchmark-json=NEW.json]
pytest benchmarks --benchmark-enable -o python_files='bench_*.py' --smoke
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from qpass.cpu import detect
from qpass.frontends.commands import session

SMOKE = {
    "test_linear[w4a8-g128-1536to8960-5]",
    "test_attention[smollm2-135m-1-512-qpass]",
    "test_token[stock]",
    "test_prompt[stock-128]",
    "test_verification[stock-1]",
    "test_load",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qpass")
    group.addoption("--model", help="a model's folder for the suites of whole models; by default the demo's SmolLM2")
    group.addoption(
        "--smoke", action="store_true", help="a case or two of each suite on a tiny model, without Inductor"
    )


def pytest_configure(config: pytest.Config) -> None:
    session.prepare()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--smoke"):
        items[:] = [item for item in items if item.name in SMOKE]


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--smoke"))


@pytest.fixture(scope="session")
def model_folder(request: pytest.FixtureRequest, smoke: bool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """``--model``, the demo's model, or a tiny one that is made on the spot."""
    if smoke:
        return str(_tiny(tmp_path_factory.mktemp("tiny")))
    given = request.config.getoption("--model")
    if given:
        return str(given)
    from qpass.frontends.demo_model import demo_model_path

    return str(demo_model_path())


@pytest.fixture(scope="session")
def loaded(model_folder: str, smoke: bool) -> Any:
    from types import SimpleNamespace

    from qpass.frontends.hf import load

    if smoke:  # no tokenizer beside it
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval().requires_grad_(False)
        return SimpleNamespace(model=model, tokenizer=None)
    return load(model_folder, codes=False)  # full precision, so that each scheme starts from the same weights


@pytest.fixture
def rates(benchmark: Any) -> Any:
    """The machine's limits, measured right before the case."""
    from qpass.kernels.rates import measure

    gc.collect()
    return measure(detect())


def _tiny(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=258, num_key_value_heads=2, max_position_embeddings=256, **shape)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
