"""A model's folder as older transformers read it: version 5 writes rope_parameters and dtype, version 4 wants rope_theta and torch_dtype."""

from __future__ import annotations

import json
from pathlib import Path


def plain_folder(source: str, work: str) -> str:
    """A copy of links with a config that both read."""
    origin, copy = Path(source).resolve(), Path(work) / f"{Path(source).name}-plain"
    copy.mkdir(parents=True, exist_ok=True)
    for file in origin.iterdir():
        if not (copy / file.name).exists() and file.name not in ("config.json", "tokenizer_config.json"):
            (copy / file.name).symlink_to(file)
    config = json.loads((origin / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    config["torch_dtype"] = config.get("dtype", "bfloat16")
    (copy / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((origin / "tokenizer_config.json").read_text())
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer.pop("extra_special_tokens", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return str(copy)
