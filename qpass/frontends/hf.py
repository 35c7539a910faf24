"""Load what a user calls MODEL: a local folder, a .gguf file, or the id of a model on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpass.errors import CheckpointError, OptionError, QpassError
from qpass.frontends import progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ACCEPTED = "a folder with a config.json, a .gguf file, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"

HUB_TIMEOUT_S = 5
"""How long the hub may take to answer whether a model exists."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Loaded:
    """A causal language model in eval mode without gradients, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str

    @property
    def weight_bytes(self) -> int:
        """What the parameters occupy in full precision, a tied one once."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


def load(source: str | Path, *, dtype: torch.dtype | None = None, codes: bool = True) -> Loaded:
    """Load model and tokenizer; bf16 unless ``dtype`` says otherwise.

    Quantized weights keep their codes and have no others (see ``qpass.load``); without ``codes``, those of a .gguf file
    get values instead.

    Raises OptionError for something that is not there, CheckpointError for something that can't be read; both name
    what is accepted. An unknown hub id or an unreachable hub is told within seconds.
    """
    from transformers import AutoTokenizer

    from qpass.frontends.load import load_model

    name, extra = locate(str(source))
    with progress.waiting(f"loading {Path(str(source)).name}"), quiet_bars(), readable(str(source)):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **extra)
        model = load_model(name, extra, dtype=dtype, codes=codes)
    return Loaded(model.requires_grad_(False), tokenizer, str(source))


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer alone. Raises as :func:`load` does."""
    from transformers import AutoTokenizer

    name, extra = locate(str(source))
    with readable(str(source)):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **extra)


def locate(source: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes: a name and further arguments. Needs no torch, so a wrong MODEL is told at once."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise OptionError(f"the folder {source} has no config.json; accepted: {ACCEPTED}")
        return str(path), {}
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise OptionError(f"the file {source} is not a .gguf file; accepted: {ACCEPTED}")
        _check_gguf(path)
        return str(path.parent), {"gguf_file": path.name}
    if source.startswith(("/", ".", "~")) or source.lower().endswith(".gguf") or not _HUB_ID.fullmatch(source):
        raise OptionError(f"{source!r} does not exist; accepted: {ACCEPTED}")
    return source, _from_hub(source)


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it doesn't begin with the letters GGUF")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise OptionError("reading a .gguf file needs the package gguf: pip install gguf") from error


def _from_hub(name: str) -> dict[str, Any]:
    """Arguments to load a hub id: from the hub where it answers, else from the local cache of earlier downloads."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    if cached and os.environ.get("HF_HUB_OFFLINE"):
        return {"local_files_only": True}
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise OptionError(
            f"{name!r} is gated on the hub: accept its terms there and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise OptionError(f"{name!r} is neither a local path nor a model on the hub; accepted: {ACCEPTED}") from error
    except Exception as error:  # the network's many ways to fail: which one changes nothing for the user
        if cached:
            return {"local_files_only": True}
        raise OptionError(
            f"{name!r} is not a local path, and the hub does not answer ({type(error).__name__}); accepted: {ACCEPTED}"
        ) from error
    return {}


@contextlib.contextmanager
def readable(source: str) -> Iterator[None]:
    """Whatever goes wrong inside the libraries becomes one sentence with the model's name."""
    try:
        yield
    except QpassError:
        raise
    except Exception as error:  # a foreign file can make its reader fail in any way
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{source} could not be loaded as a causal language model with a tokenizer: {first}"
        ) from error


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """transformers' own bars over weight tensors stay away: one spinner a wait is enough."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    shown, bar = logging.is_progress_bar_enabled(), getattr(modeling_gguf_pytorch_utils, "tqdm", None)
    logging.disable_progress_bar()
    if bar is not None:  # this one asks no switch
        modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if bar is not None:
            modeling_gguf_pytorch_utils.tqdm = bar
