"""A model as it would be quantized, on plain torch: weights through their codes and back, activations through int8 and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qpass.algorithms.outliers import outlier_columns
from qpass.algorithms.rtn import rtn
from qpass.algorithms.smoothing import Smoothed, fake_quantize
from qpass.errors import OptionError
from qpass.frontends.instrument import Reader, Shared, instrument, plain_linear
from qpass.passes.calibrated import Calibrated
from qpass.qactivation import rotated
from qpass.scheme import Scheme


class Simulation:
    """``schemes`` by module name may change between calls; a linear without one, or one that doesn't quantize, is plain.

    With a :class:`Calibrated` int8 activations are smoothed as the passes would. Nothing is compiled, so another choice of
    schemes costs its forward only.
    """

    def __init__(self, model: nn.Module, calibrated: Calibrated | None = None) -> None:
        self.schemes: dict[str, Scheme] = {}
        self.calibrated = calibrated
        self.inputs: dict[tuple[str, ...], Shared] = {}  # every input that linears read, seen so far
        self._shared: dict[str, Shared] = {}
        self._kept: tuple[Any, Tensor] | None = None  # the last weight: a single site's is asked for batch by batch
        self._run = instrument(model, enter=self._enter, linear=self._linear)

    def __call__(self, batch: Any) -> Any:
        return self._run(batch)

    def _enter(self, shared: Shared, x: Tensor) -> None:
        self.inputs.setdefault(shared.names, shared)
        for name in shared.names:
            self._shared[name] = shared

    def _linear(self, reader: Reader, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scheme = self.schemes.get(reader.name)
        if scheme is None or scheme.weight is None:
            return plain_linear(reader, x, weight, bias)
        rows = x.reshape(-1, x.shape[-1]).float()
        scheme, smoothed, outliers = self._decided(reader, scheme)
        divisor, scale, rotate, shift = (
            (smoothed.divisor, smoothed.scale, smoothed.rotate, smoothed.shift)
            if smoothed
            else (None, None, False, 0.0)
        )
        if divisor is not None:
            rows = rows / divisor
        if rotate:
            rows = rotated(rows)
        matrix = self._matrix(reader, weight, scheme, divisor, rotate)
        if outliers is not None:
            exact = rows[:, outliers] @ weight[:, outliers].float().t()
            rows = rows.index_fill(1, outliers, 0.0)
            y = fake_quantize(rows, scheme, scale) @ matrix.t() + exact
        else:
            y = fake_quantize(rows, scheme, scale, shift) @ matrix.t()
        if bias is not None:
            y = y + bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    def _decided(self, reader: Reader, scheme: Scheme) -> tuple[Scheme, Smoothed | None, Tensor | None]:
        if self.calibrated is None:
            if scheme.needs_statistics:
                raise OptionError(f"{reader.name}: scheme {scheme} needs statistics: pass stats=")
            return scheme, None, None
        if scheme.outliers:
            return scheme, None, outlier_columns(self.calibrated.seen(reader.name, scheme).absmax)
        if scheme.activation == "a16":
            return scheme, None, None
        readers = [
            r
            for r in self._shared[reader.name].readers
            if self.schemes.get(r.name, scheme).quantizes and r.name in self.schemes
        ]
        decision = self.calibrated.decide(
            [r.name for r in readers],
            [self.schemes[r.name] for r in readers],
            lambda: [r.ref.read() for r in readers],
            smoothable=not any(r.tied for r in readers),
        )
        if decision is None:
            return scheme, None, None
        index = [r.name for r in readers].index(reader.name)
        return decision.schemes[index], decision.smoothed, None

    def _matrix(self, reader: Reader, weight: Tensor, scheme: Scheme, divisor: Tensor | None, rotate: bool) -> Tensor:
        assert scheme.weight is not None
        key = (reader.name, scheme.weight, id(divisor), rotate)
        if self._kept is None or self._kept[0] != key:
            scaled = weight if divisor is None else weight.float() * divisor
            self._kept = (key, rtn(rotated(scaled) if rotate else scaled, scheme.weight).dequantize())
        return self._kept[1]


def logits_of(output: Any) -> Tensor:
    """What a model predicts, [..., classes]: an output's ``logits``, or the first tensor of what it returns."""
    found = getattr(output, "logits", None)
    if found is None:
        found = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(found, Tensor):
        raise OptionError(
            f"the model returns {type(output).__name__}; a tensor of logits is needed, or an output with one"
        )
    return found


def divergence(reference: Tensor, other: Tensor) -> float:
    """The mean over all rows of KL(reference || other), of log-probabilities of ``other`` under those of ``reference``; nats."""
    total = 0.0
    for p, q in zip(reference.flatten(0, -2).split(256), other.flatten(0, -2).split(256), strict=True):
        p, q = torch.log_softmax(p.float(), -1), torch.log_softmax(q.float(), -1)
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return max(0.0, total / max(1, reference.numel() // reference.shape[-1]))
