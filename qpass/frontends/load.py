"""``qpass.load``: a model in whatever format its weights are, the codes of quantized ones as they are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpass.checkpoints.files import INDEX, SINGLE, Checkpoint
from qpass.checkpoints.formats import READERS, reader_of
from qpass.checkpoints.validate import read_json, refuse
from qpass.errors import OptionError
from qpass.frontends.hf import locate, quiet_bars, readable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load(
    source: str | Path, *, dtype: torch.dtype | None = None, scheme: Any = None, exclude: Any = ()
) -> PreTrainedModel:
    """Load a causal language model in eval mode.

    source  a folder or hub id in full precision or with the weights of GPTQ, AWQ, auto-round, compressed-tensors or
            qpass itself, or a .gguf file. Quantized layers keep their codes and have no other values.
    dtype   of everything that is not quantized, and of the layers' results; bfloat16 by default
    scheme  quantizes a model in full precision as it is read, as ``QPassConfig(scheme=..., exclude=...)`` does

    Raises OptionError for a source that isn't there, CheckpointError for files that are not what they claim to be.
    """
    name, extra = locate(str(source))
    with quiet_bars(), readable(str(source)):
        return load_model(name, extra, dtype=dtype, scheme=scheme, exclude=exclude)


def load_model(
    name: str,
    extra: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    scheme: Any = None,
    exclude: Any = (),
    codes: bool = True,
) -> Any:
    """``name`` and ``extra`` as :func:`locate` gives them; without ``codes`` a .gguf file's weights get values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qpass.frontends.huggingface import QPassConfig

    dtype = dtype or torch.bfloat16
    if "gguf_file" in extra:
        if scheme is not None:
            raise OptionError(f"{extra['gguf_file']} is quantized already; load it without a scheme")
        from qpass.frontends.gguf_model import load_gguf

        return load_gguf(Path(name) / extra["gguf_file"], dtype, codes=codes)
    folder = Path(name)
    if folder.is_dir():
        _check_folder(folder)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False, **extra)
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    arguments: dict[str, Any] = {}
    if method is not None and method != "qpass" and method in READERS:
        reader_of(stored, folder / "config.json")  # a config that can't be read is told before any weight is fetched
        asked = QPassConfig()
        asked.foreign = stored
        del config.quantization_config
        arguments["quantization_config"] = asked
    elif scheme is not None and method is None:
        arguments["quantization_config"] = QPassConfig(scheme, exclude)
    elif scheme is not None:
        raise OptionError(f"{name} is quantized already ({method}); load it without a scheme")
    return AutoModelForCausalLM.from_pretrained(
        name, config=config, dtype=dtype, trust_remote_code=False, **arguments, **extra
    ).eval()


def _check_folder(folder: Path) -> None:
    """What can be known of a local folder before transformers reads it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    where = folder / "config.json"
    config = read_json(where)
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        refuse(where, "auto_map", "asks to run code of the checkpoint, which qpass never does")
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        Checkpoint.of_folder(folder)
    elif list(folder.glob("*.bin")):
        warnings.warn(f"{folder} has weights as pickles; transformers reads no more of them than tensors", stacklevel=3)
