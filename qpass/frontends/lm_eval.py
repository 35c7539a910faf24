"""An adapter for EleutherAI's lm-evaluation-harness, so that any of its tasks measures what qpass runs.

    python -m qpass.frontends.lm_eval --model qpass --model_args pretrained=MODEL,scheme=w4a16-g128 --tasks hellaswag

lm_eval has no entry point for models of other packages: this module registers the name "qpass" when it is imported, and
run as a program it is lm_eval's own command line. In Python: ``import qpass.frontends.lm_eval`` and then
``lm_eval.simple_evaluate(model="qpass", model_args=...)``. Needs the extra ``qpass[eval]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass.errors import OptionError
from qpass.frontends.hf import load
from qpass.frontends.speculation import Speculation
from qpass.measure.humaneval_samples import stop_at
from qpass.runtime.sampling import Sampling

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise OptionError("lm_eval is not installed: pip install 'qpass[eval]'") from error

SAMPLED = ("temperature", "top_p", "top_k")


@register_model("qpass")
class QPassLM(HFLM):
    """lm_eval's Hugging Face model, whose forward and generation are qpass' compiled ones.

    ``pretrained``, ``scheme``, ``exclude`` (patterns with ; between them), ``lowering``, ``draft`` and ``kv`` as for
    ``qpass run``; the other arguments are HFLM's. One graph serves every length of a request; the batch size is fixed,
    and a batch that isn't full is filled up.
    """

    def __init__(
        self,
        pretrained: str,
        scheme: str = "w8a16",
        exclude: str = "",
        lowering: str | None = None,
        draft: str | None = None,
        kv: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        import qpass

        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise OptionError(
                f"batch_size is {batch_size!r}; accepted: a whole number >= 1, since graphs have a fixed one"
            )
        if device not in (None, "cpu"):
            raise OptionError(f"device is {device!r}; qpass runs on the CPU")
        loaded = load(pretrained)
        super().__init__(
            pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=int(batch_size), device="cpu", **kwargs
        )
        self.pretrained = pretrained  # its name again, for the table of results
        patterns = tuple(filter(None, exclude.split(";")))
        chosen: dict[str, Any] = {"scheme": scheme, "exclude": patterns, "lowering": lowering}
        self.fast = qpass.compile(loaded.model, insist=True, **chosen)
        self.spec = Speculation(loaded.model, draft, kv_dtype=kv, tokenizer=loaded.tokenizer, **chosen)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Token ids [B, S], padded on the right, to logits [B, S, V]."""
        rows = inps.shape[0]
        ids = _filled(inps, self.batch_size)
        if ids.shape[1] == 1:  # of its own, or the graph for every length would have to serve one token too
            ids = torch.cat([ids, ids], 1)
        torch._dynamo.mark_dynamic(ids, 1)
        with torch.no_grad():
            return self.fast(input_ids=ids, use_cache=False).logits[:rows, : inps.shape[1]]

    def _model_generate(
        self,
        context: Tensor,
        max_length: int,
        stop: list[str],
        attention_mask: Tensor | None = None,
        do_sample: bool | None = None,
        **how: Any,
    ) -> Tensor:
        """Context [B, S], padded on the left, and what follows it: [B, S + new]."""
        unknown = set(how) - {*SAMPLED, "seed"}
        if unknown:
            raise OptionError(f"generation argument {min(unknown)!r}; accepted: do_sample, {', '.join(SAMPLED)}")
        mask = torch.ones_like(context) if attention_mask is None else attention_mask
        greedy = not do_sample or not how.get("temperature", 1.0)
        sampling = Sampling() if greedy else Sampling(**{n: how[n] for n in SAMPLED if n in how})
        rows = context.shape[0]
        ids, mask = _filled(context, self.batch_size), _filled(mask, self.batch_size)
        prompts = [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
        ends = {*self.spec.decoder.eos(), self.eot_token_id} - {None}
        self.spec.warm_up(self.batch_size, greedy=greedy)
        out = self.spec.speculator.generate(
            ids,
            mask,
            max_new_tokens=max_length - ids.shape[1],
            sampling=sampling,
            eos_token_id=sorted(ends),
            pad_token_id=self.tokenizer.pad_token_id,
            stop=stop_at(self.tokenizer, prompts, stop),
        )
        return out.sequences[:rows]


def _filled(rows: Tensor, batch: int) -> Tensor:
    """[B, S] as [batch, S], the last row again where one is missing, contiguous: graphs are compiled for strides too."""
    missing = rows.new_zeros(max(0, batch - len(rows)), rows.shape[1]) + rows[-1:]
    return torch.cat([rows, missing]).flatten().view(-1, rows.shape[1])


def main() -> None:
    """lm_eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
