"""A .gguf file as a transformers model whose linear layers have the file's codes."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qpass.checkpoints.artefact import CODES
from qpass.checkpoints.gguf import GgufFile
from qpass.checkpoints.gguf_blocks import BLOCKS
from qpass.checkpoints.stored import StoredLinear
from qpass.checkpoints.validate import refuse
from qpass.lowering.given import give


def load_gguf(path: Path, dtype: torch.dtype, *, codes: bool = True) -> Any:
    """Names and order of rows are undone as transformers' own loader does it; embeddings get their values.

    An architecture that transformers loads in another way, and a matrix whose type our formats can't hold, get values
    in ``dtype`` too, and so does everything without ``codes``. Raises CheckpointError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from qpass.frontends.coded import given_from
    from qpass.frontends.huggingface import QPassConfig

    file = GgufFile(path)
    if not codes or is_gguf_arch_supported(file.architecture):
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        ).eval()
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config.to_dict())
    names = _names(skeleton, processor)
    tied = set(getattr(skeleton, "all_tied_weights_keys", {}).values())
    state, layers, dense = _read(file, skeleton, processor, names, dtype)
    _check(file, skeleton, state, layers)
    asked = QPassConfig()
    asked.layers = {name: layer for name, layer in layers.items() if name not in tied}
    state |= {f"{name.removesuffix('.weight')}.{CODES}": torch.empty(0) for name in asked.layers}
    if dense:
        warnings.warn(f"{path.name}: codes of {', '.join(sorted(dense))} are loaded as {dtype} values", stacklevel=2)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = kind.from_pretrained(None, config=config, state_dict=state, quantization_config=asked, dtype=dtype)
    for name in tied & layers.keys():  # the head multiplies by codes, the embedding reads values
        give(model.get_parameter(name), given_from(layers[name]))
    return model.eval()


def _names(skeleton: Any, processor: Any) -> dict[str, str]:
    """The model's name of each of the file's tensors.

    transformers asks every module for its part of the table, and builds gguf's map of all names anew for each: seconds. Names are
    those of the whole model, or (Bloom) of the model without its head.
    """
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    prefix = skeleton.base_model_prefix
    inner = SimpleNamespace(state_dict=getattr(skeleton, prefix).state_dict, named_children=dict)
    whole = SimpleNamespace(
        config=skeleton.config, state_dict=skeleton.state_dict, named_children=lambda: [(prefix, inner)]
    )
    return get_gguf_hf_weights_map(whole, processor)


def _read(
    file: GgufFile, skeleton: nn.Module, processor: Any, names: dict[str, str], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, StoredLinear], set[str]]:
    """The model's tensors that have values, its layers that have codes, and the types that had to become values."""
    state: dict[str, Tensor] = {}
    layers: dict[str, StoredLinear] = {}
    dense: set[str] = set()
    tied = set(getattr(skeleton, "all_tied_weights_keys", {}).values())
    for name, tensor in file.tensors.items():
        target = names.get(name)
        if target is None:
            continue
        matrix = _is_matrix(skeleton, target) or target in tied
        if matrix and tensor.type in BLOCKS:
            rows = _rows(processor, name, tensor.shape)
            layer = file.linear(name, None if rows is None or bool((rows.diff() == 1).all()) else rows)
            if layer is not None and rows is not None:
                layers[target] = layer
                if target not in tied:
                    continue
            else:
                dense.add(BLOCKS[tensor.type].name)
        values = processor.process(weights=_values(file, name), name=name).weights
        state[target] = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
    return state, layers, dense


def _is_matrix(skeleton: nn.Module, target: str) -> bool:
    module, _, leaf = target.rpartition(".")
    return leaf == "weight" and type(skeleton.get_submodule(module)) is nn.Linear


def _rows(processor: Any, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """The order in which transformers takes a matrix's rows; None where it does more than that."""
    index = np.arange(shape[0], dtype=np.int64)[:, None]
    moved = processor.process(weights=index.copy(), name=name)
    if moved.name != name or moved.weights.shape != index.shape:
        return None
    rows = torch.from_numpy(np.ascontiguousarray(moved.weights[:, 0]))
    return rows if torch.equal(rows.sort().values, torch.arange(shape[0])) else None


def _values(file: GgufFile, name: str) -> np.ndarray:
    """fp32 values of any tensor."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    floats = file.floats(name)
    if floats is not None:
        return floats.float().numpy()
    tensor = file.tensors[name]
    raw = file.bytes_of(name).view(*tensor.shape[:-1], -1).numpy()
    return dequantize(raw, GGMLQuantizationType(tensor.type))


def _check(file: GgufFile, skeleton: Any, state: dict[str, Tensor], layers: dict[str, StoredLinear]) -> None:
    """Raise CheckpointError for what is missing or has another shape than the config says."""
    known = {name: tuple(tensor.shape) for name, tensor in state.items()} | {
        name: layer.shape for name, layer in layers.items()
    }
    tied = getattr(skeleton, "all_tied_weights_keys", {})
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        if name in tied:
            continue
        if name not in known:
            refuse(file.path, name, "is missing")
        if known[name] != tuple(parameter.shape):
            refuse(file.path, name, f"has shape {list(known[name])}, where the model has {list(parameter.shape)}")
