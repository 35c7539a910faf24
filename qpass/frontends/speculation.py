"""``qpass.speculate``: a model and a draft in, the model's own text out, faster."""

from __future__ import annotations

import copy
import functools
import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qpass.errors import OptionError, UnsupportedError
from qpass.frontends.api import compile, compile_with
from qpass.frontends.explain import Explanation, explain
from qpass.frontends.generation_config import Call, call_of
from qpass.frontends.hf import load
from qpass.frontends.options import Options
from qpass.runtime.decoder import Decoder
from qpass.runtime.draft import FirstOf, LayersDraft, ModelDraft, warm_up
from qpass.runtime.ngram import NgramDraft
from qpass.runtime.sampling import Sampling
from qpass.runtime.shorten import first_layers, smaller_vocabulary
from qpass.runtime.speculate import Speculator
from qpass.runtime.stats import Stats
from qpass.runtime.step import refuse
from qpass.runtime.translate import TranslatedDraft
from qpass.runtime.verify import MOST

DRAFTS = (
    "a model, a folder or hub id of one, 'ngram', 'layers:N', an object with propose(rows, k), a list of these, or None"
)


def speculate(
    target: Any = None,
    draft: Any = "ngram",
    *,
    k: int | Literal["auto"] = "auto",
    scheme: Any = None,
    draft_scheme: Any = "w8a8-dynamic",
    exclude: Any = (),
    lowering: str | None = None,
    release_weights: bool = False,
    kv_dtype: str | None = None,
    tokenizer: Any = None,
    draft_tokenizer: Any = None,
    draft_vocabulary: int | None = None,
) -> Any:
    """Generate with ``target`` and let ``draft`` guess ahead; the output is exactly the target's own.

    target            a causal language model of transformers, or what ``qpass.compile`` made of one. An nn.Module class:
                      its instances' ``generate`` speculates. None: a decorator, for such a class or for a function
                      that returns a model.
    draft             a smaller model of the same tokenizer, the folder or hub id of one, "ngram" (what followed the same
                      words before, in prompt and output), "layers:N" (the target's own first N layers), an object with
                      ``propose(rows, k)``, a list of these (a row takes the first that proposes), None: plain decoding
    k                 tokens drafted a round, or "auto": chosen while running, 0 where speculation loses
    scheme, exclude, lowering, release_weights  for the target, as for ``qpass.compile``
    draft_scheme      the scheme of a draft model
    kv_dtype          None, or "int8" for a cache in half of the memory
    tokenizer, draft_tokenizer  of target and draft: with different vocabularies drafts are translated by text
    draft_vocabulary  let a draft model propose only the first tokens of its vocabulary, the most frequent, and rare ones that
                      the text has: a shorter head, which costs less

    Raises OptionError or UnsupportedError for a pair that can't work together, with the reason.
    """
    arguments = {name: value for name, value in locals().items() if name != "target"}
    if target is None:
        return functools.partial(speculate, **arguments)
    if isinstance(target, type) and issubclass(target, nn.Module):
        return _speculating_class(target, arguments)
    if isinstance(target, nn.Module):
        return Speculation(target, **arguments)
    if inspect.isfunction(target):

        @functools.wraps(target)
        def made(*args: Any, **kwargs: Any) -> Speculation:
            return Speculation(target(*args, **kwargs), **arguments)

        return made
    raise OptionError(
        f"qpass.speculate takes a model, a class of models or a function that returns one, not {target!r}"
    )


class Speculation:
    """What ``qpass.speculate`` returns: ``generate``, ``stream``, ``stats``, and a ``custom_generate`` of transformers."""

    def __init__(
        self,
        target: nn.Module,
        draft: Any = "ngram",
        *,
        k: int | Literal["auto"] = "auto",
        scheme: Any = None,
        draft_scheme: Any = "w8a8-dynamic",
        exclude: Any = (),
        lowering: str | None = None,
        release_weights: bool = False,
        kv_dtype: str | None = None,
        tokenizer: Any = None,
        draft_tokenizer: Any = None,
        draft_vocabulary: int | None = None,
    ) -> None:
        chosen = {"scheme": scheme, "exclude": exclude, "lowering": lowering, "release_weights": release_weights}
        given = {name for name, value in chosen.items() if value not in (None, (), False)}
        backend = getattr(target, "_qpass_backend", None)
        if backend is not None and given:
            raise OptionError(f"{min(given)} was chosen when the model was compiled; leave it out here")
        options = Options.make(**chosen) if backend is None else backend.options
        own = functools.partial(compile_with, options=options, fullgraph=True, dynamic=False)
        self.decoder = Decoder(target, own, kv_dtype=kv_dtype)
        drafting = functools.partial(
            compile, scheme=draft_scheme, release_weights=release_weights, fullgraph=True, dynamic=False
        )
        makes = _Drafts(self.decoder, own, drafting, kv_dtype, tokenizer, draft_tokenizer, draft_vocabulary)
        self.speculator = Speculator(self.decoder, makes.draft(draft), k=k)
        self._ready: set[tuple[int, bool]] = set()

    @property
    def stats(self) -> Stats:
        """Of the last generation: tokens a step, acceptance, the cost of verification and draft, K over time."""
        return self.speculator.stats

    def explain(self) -> Explanation:
        """What became of the target's linears; empty before the first generation or ``warm_up``."""
        return explain(self.decoder.likely_step)

    def warm_up(self, batch: int = 1, *, greedy: bool = True) -> float:
        """Compile what a generation needs, and say so if speculation can't promise equal tokens; returns the seconds."""
        if (batch, greedy) in self._ready:
            return 0.0
        speculates = self.speculator.draft is not None
        steps = ["prompt", *(["likeliest"] if greedy else ["decode"])]
        if speculates:
            steps.append("verify" if greedy else "block")
        started = time.perf_counter()
        self.decoder.warm_up(batch, steps=steps)
        if speculates and greedy:
            self._tell(batch)
        if speculates:
            warm_up(self.speculator.draft, batch, greedy=greedy)
        self._ready.add((batch, greedy))
        return time.perf_counter() - started

    def _tell(self, batch: int) -> None:
        explanation = self.explain()
        least = min((record.same_rows for record in explanation.records), default=0)
        if explanation.left or least < batch * MOST or self.decoder.attention_refusal:
            reason = self.decoder.attention_refusal or explanation.promise()
            warnings.warn(
                "this target may round a token's last bits by how many are computed at once "
                f"({reason}), so where two tokens are nearly as likely, speculation may choose the other one",
                stacklevel=4,
            )

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        streamer: Any = None,
        tokenizer: Any = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate`` with its names and its GenerationConfig; greedy or sampled, one batch of rows.

        ``streamer`` gets the tokens as they are accepted; ``tokenizer`` is needed for ``stop_strings``; ``generator``
        draws the random numbers (None: torch's global one). Raises OptionError for what speculation can't do (beams,
        scores), and transformers' own errors for what it refuses.
        """
        model = self.decoder.model
        if inputs is None and "input_ids" in kwargs:
            inputs = kwargs.pop("input_ids")
        stop_strings = kwargs.pop("stop_strings", None) or getattr(generation_config, "stop_strings", None)
        if stop_strings is not None:
            kwargs["stopping_criteria"] = _with_strings(kwargs.get("stopping_criteria"), stop_strings, tokenizer)
            if generation_config is not None:  # transformers would ask for a tokenizer that it doesn't hand on
                generation_config = copy.copy(generation_config)
                generation_config.stop_strings = None
        if streamer is not None and inputs is not None:
            streamer.put(inputs.cpu())

        def decode(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **rest: Any,
        ) -> Any:
            self._check_model(model)
            call = call_of(input_ids, logits_processor, stopping_criteria, generation_config, rest)
            return self._decode(call, streamer, generator)

        generate = getattr(model, "_qpass_generate", model.generate)
        return generate(inputs, generation_config=generation_config, custom_generate=decode, **kwargs)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding method of ``model.generate(..., custom_generate=this)``; ``model`` must be this one's target.

        transformers keeps ``streamer=`` and ``stop_strings`` to itself here: :meth:`generate` takes both.
        """
        self._check_model(model)
        return self._decode(call_of(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs))

    def _decode(self, call: Call, streamer: Any = None, generator: torch.Generator | None = None) -> Any:
        if streamer is not None and len(call.arguments["input_ids"]) > 1:
            raise OptionError("a streamer takes one row; give one prompt at a time")
        self.warm_up(len(call.arguments["input_ids"]), greedy=call.sampling.greedy and not call.sampling.needs_tokens)

        def put(step: list[list[int]]) -> None:
            for token in step[0]:
                streamer.put(torch.tensor([token]))

        out = self.speculator.generate(
            **call.arguments, generator=generator, on_tokens=None if streamer is None else put
        )
        if streamer is not None:
            streamer.end()
        return call.output(out)

    def _check_model(self, model: Any) -> None:
        ours = self.decoder.model
        if model is not ours and model.get_input_embeddings() is not ours.get_input_embeddings():
            raise OptionError(
                f"this speculation was made for another {type(ours).__name__}; use it with the model that it was made from"
            )

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        stop: Callable[[Sequence[int]], bool] | None = None,
    ) -> Iterator[list[list[int]]]:
        """Yield one list a step, each row's new tokens in it; leave the loop to cancel. See ``Speculator.stream``."""
        how = sampling or Sampling()
        self.warm_up(len(input_ids), greedy=how.greedy and not how.needs_tokens)
        return self.speculator.stream(
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            sampling=how,
            eos_token_id=eos_token_id,
            generator=generator,
            stop=stop,
        )


class _Drafts:
    """Makes drafts of what users name them by."""

    def __init__(
        self,
        target: Decoder,
        own: Callable[..., Any],
        drafting: Callable[..., Any],
        kv_dtype: str | None,
        tokenizer: Any,
        draft_tokenizer: Any,
        vocabulary: int | None,
    ) -> None:
        self.target, self.own, self.drafting, self.kv_dtype = target, own, drafting, kv_dtype
        self.tokenizer, self.draft_tokenizer, self.vocabulary = tokenizer, draft_tokenizer, vocabulary

    def draft(self, given: Any) -> Any:
        if given is None or given == "ngram":
            return None if given is None else NgramDraft()
        if isinstance(given, (list, tuple)):
            return FirstOf(*map(self.draft, given)) if len(given) > 1 else self.draft(given[0] if given else None)
        if isinstance(given, str) and given.startswith("layers:"):
            return self._layers(given)
        if isinstance(given, (str, Path)):
            loaded = load(given)
            self.draft_tokenizer = self.draft_tokenizer or loaded.tokenizer
            return self._model(loaded.model)
        if isinstance(given, nn.Module):
            return self._model(given)
        if callable(getattr(given, "propose", None)) and not isinstance(given, type):
            return given
        raise OptionError(f"draft is {given!r}; accepted: {DRAFTS}")

    def _layers(self, given: str) -> Any:
        count = given.removeprefix("layers:")
        if not count.isdigit():
            raise OptionError(f"draft is {given!r}; accepted: layers:N with a whole number N")
        short = first_layers(self.target.model, int(count))
        return LayersDraft(Decoder(short, self.own, kv_dtype=self.kv_dtype))

    def _model(self, model: nn.Module) -> Any:
        name = type(model).__name__
        if model is self.target.model:
            raise OptionError("the draft is the target itself; accepted: a smaller model")
        reason = refuse(model)
        if reason is not None:
            raise UnsupportedError(f"the draft: {reason}")
        backend = getattr(model, "_qpass_backend", None)
        compile = self.drafting
        if backend is not None:
            compile = functools.partial(compile_with, options=backend.options, fullgraph=True, dynamic=False)
        translated = self._translates(model, name)
        if self.vocabulary is not None:
            model = smaller_vocabulary(model, self.vocabulary)
        try:
            draft = ModelDraft(Decoder(model, compile))
        except UnsupportedError as error:
            raise UnsupportedError(f"the draft: {error}") from error
        return TranslatedDraft(draft, self.draft_tokenizer, self.tokenizer) if translated else draft

    def _translates(self, model: Any, name: str) -> bool:
        """Whether the draft speaks in other tokens than the target. Raises OptionError if that can't be bridged."""
        both = self.tokenizer is not None and self.draft_tokenizer is not None
        if both:
            return self.tokenizer.get_vocab() != self.draft_tokenizer.get_vocab()
        theirs, ours = (m.config.get_text_config().vocab_size for m in (model, self.target.model))
        if theirs != ours:
            raise OptionError(
                f"the draft {name} has a vocabulary of {theirs} tokens and the target one of {ours}; give tokenizer= and "
                "draft_tokenizer=, so that drafts are translated by text, or a draft of the target's family"
            )
        return False


def _with_strings(criteria: Any, strings: Any, tokenizer: Any) -> Any:
    from transformers import StoppingCriteriaList, StopStringCriteria

    if tokenizer is None:
        raise OptionError("stop_strings need tokenizer=, to know which tokens spell them")
    return StoppingCriteriaList([*(criteria or []), StopStringCriteria(tokenizer, strings)])


def _speculating_class(cls: Any, arguments: dict[str, Any]) -> Any:
    """The same class; an instance's ``generate`` speculates from its first call on."""
    plain = cls.generate

    def speculation(self: Any) -> Speculation:
        found = self.__dict__.get("_qpass_speculation")
        if found is None:
            found = Speculation(self, **arguments)
            object.__setattr__(self, "_qpass_speculation", found)
        return found

    @functools.wraps(plain)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return speculation(self).generate(*args, **kwargs)

    cls.generate, cls._qpass_generate, cls.speculation = generate, plain, property(speculation)
    return cls
