"""MODEL as a folder, a .gguf file or a hub id; what is wrong is told in one sentence, and quickly."""

import time

import pytest
import torch

from qpass.errors import CheckpointError, OptionError
from qpass.frontends import hf


def test_a_folder_loads_as_bf16_without_gradients(checkpoint):
    loaded = hf.load(checkpoint)
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.weight_bytes == 2 * sum(p.numel() for p in loaded.model.parameters())
    assert loaded.tokenizer.decode(loaded.tokenizer("hello").input_ids) == "hello"


def test_dtype_is_a_choice(checkpoint):
    assert hf.load(checkpoint, dtype=torch.float32).model.dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["/does/not/exist", "./nothing", "~/nothing", "missing.gguf", "two/many/slashes", "a b"]
)
def test_a_missing_path_names_what_is_accepted(name):
    with pytest.raises(OptionError, match=r"does not exist; accepted: a folder with a config.json"):
        hf.locate(name)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(OptionError, match=r"has no config.json; accepted"):
        hf.locate(str(tmp_path))


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"pickle?")
    with pytest.raises(OptionError, match=r"is not a .gguf file; accepted"):
        hf.locate(str(path))


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip"])
def test_a_gguf_that_is_none(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        hf.locate(str(path))


def test_a_truncated_gguf_is_one_sentence(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\xff" * 16)
    with pytest.raises(CheckpointError, match="could not be loaded"):
        hf.load(path)


def test_a_folder_with_a_broken_config_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="could not be loaded as a causal language model"):
        hf.load(tmp_path)


def _hub(monkeypatch, error):
    import huggingface_hub

    def model_info(self, name, **options):
        assert options["timeout"] <= 10
        if error is not None:
            raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


def test_an_unreachable_hub_is_told_within_seconds(monkeypatch):
    _hub(monkeypatch, ConnectionError("no route"))
    started = time.monotonic()
    with pytest.raises(
        OptionError, match=r"is not a local path, and the hub does not answer \(ConnectionError\); accepted"
    ):
        hf.locate("someone/some-model-that-is-not-cached")
    assert time.monotonic() - started < 5


def test_an_unknown_hub_id(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # its constructor wants a real response
    _hub(monkeypatch, error)
    with pytest.raises(OptionError, match="neither a local path nor a model on the hub"):
        hf.locate("someone/some-model-that-is-not-there")


def test_a_cached_model_loads_without_the_hub(monkeypatch):
    import huggingface_hub

    _hub(monkeypatch, ConnectionError("no route"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: "/cache/config.json")
    assert hf.locate("someone/cached") == ("someone/cached", {"local_files_only": True})
