"""transformers' prepared generation (its processors, criteria and config) as arguments of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from qpass.errors import OptionError
from qpass.runtime.sampling import Sampling, sampling_of
from qpass.runtime.speculate import Generation

_REFUSED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class Call:
    """One call of ``generate``: ``arguments`` for ``Speculator.generate``."""

    arguments: dict[str, Any]
    sampling: Sampling
    as_dict: bool

    def output(self, generation: Generation) -> Any:
        """What transformers' own decoding methods return: the sequences, or a ModelOutput with them."""
        if not self.as_dict:
            return generation.sequences
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, generation.sequences))


def call_of(input_ids: Tensor, processors: Any, criteria: Any, config: Any, model_kwargs: dict[str, Any]) -> Call:
    """Raises OptionError for what speculation can't do."""
    _refuse(config, processors, model_kwargs)
    sampling = sampling_of(list(processors or ()), bool(config.do_sample))
    eos = getattr(config, "_eos_token_tensor", None)
    pad = getattr(config, "_pad_token_tensor", None)
    arguments = {
        "input_ids": input_ids,
        "attention_mask": model_kwargs.get("attention_mask"),
        "max_new_tokens": config.max_length - input_ids.shape[1],
        "sampling": sampling,
        "eos_token_id": () if eos is None else eos.flatten().tolist(),
        "pad_token_id": None if pad is None else int(pad),
        "stop": _stop(criteria),
        "show_padding": True,
    }
    return Call(arguments, sampling, bool(config.return_dict_in_generate))


def _refuse(config: Any, processors: Any, model_kwargs: dict[str, Any]) -> None:
    from transformers.generation import GenerationMode
    from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise OptionError(f"speculation decodes greedily or by sampling, not by {mode.value.replace('_', ' ')}")
    for name in _REFUSED:
        if getattr(config, name, False):
            raise OptionError(f"{name}: speculation keeps no {name.removeprefix('output_').replace('_', ' ')}")
    if any(isinstance(each, UnbatchedClassifierFreeGuidanceLogitsProcessor) for each in processors or ()):
        raise OptionError("guidance_scale runs the model a second time a token, which speculation can't check ahead")
    if model_kwargs.get("inputs_embeds") is not None:
        raise OptionError("speculation takes input_ids, not inputs_embeds: a draft must know the tokens")
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))  # its name until transformers 5.23
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise OptionError(
            "speculation keeps a cache of its own and can't go on with past_key_values; give the whole text"
        )


def _stop(criteria: Any) -> Callable[[Sequence[int]], bool] | None:
    """What is left of the stopping criteria once length and end tokens are known, asked after each token of a row."""
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    rest = [each for each in criteria or () if not isinstance(each, (EosTokenCriteria, MaxLengthCriteria))]
    if not rest:
        return None

    def stop(row: Sequence[int]) -> bool:
        tokens = torch.tensor([list(row)])
        return any(bool(torch.as_tensor(each(tokens, None)).any()) for each in rest)

    return stop
