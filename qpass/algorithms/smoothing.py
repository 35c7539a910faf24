"""SmoothQuant (arXiv 2211.10438): move the outliers of a linear's input into its weight, channel by channel.

``x W^T = (x / s) (W * s)^T`` for any positive ``s [K]``; with ``s = amax(|x|)^alpha / amax(|W|)^(1 - alpha)`` (equation 4)
the larger alpha is, the flatter the input gets and the rougher the weight. What is large in other channels for each token, as a gate's
product is, no ``s`` flattens; a rotation does: ``x W^T = (x H) (W H)^T`` for an orthonormal ``H`` (QuaRot, 2404.00456).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qpass.algorithms.observe import Observer
from qpass.algorithms.rtn import rtn
from qpass.qactivation import can_be_rotated, quantize_activation, quantize_by_scale, rotated
from qpass.scheme import Scheme

GRID = (None, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The alphas that "auto" tries; None: no smoothing."""

ROTATION_PAYS = 3e-5
"""Above this error of a layer's output "auto" tries a rotated input as well, whose prologue takes a little longer ..."""

ROTATION_SAVES = 0.7
"""... and takes it where no more than this share of the error is left."""

CLIPS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)
"""Shares of the largest magnitude at which a static scale may cut off."""

ONE_SIDED = 0.95
"""An asymmetric quantizer is tried where its step is at most this share of the symmetric one's ..."""

SHIFT_SAVES = 0.8
"""... and taken where no more than this share of the error is left."""

ROWS = 256
"""Outputs of a layer on which errors are measured, evenly spread."""


@dataclass(frozen=True)
class Error:
    """Squared error over squared output of a layer, a token at a time: the mean, and that of the extreme tokens alone."""

    mean: float
    extreme: float

    def of(self, static: bool) -> float:
        """What counts: a scale a token adapts to extremes by itself, a static one must not fail them."""
        return max(self.mean, self.extreme) if static else self.mean


@dataclass(frozen=True)
class Smoothed:
    """``divisor`` fp32 [K] or None; ``scale`` and ``shift`` of a static quantizer of ``x / divisor``, or None and 0; what they cost the output."""

    alpha: float | None
    divisor: Tensor | None
    scale: float | None
    error: Error
    rotate: bool = False  # x / divisor, before it is quantized
    shift: float = 0.0


def divisor(absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """``s`` fp32 [K] of all linears [N_i, K] that read one input, with its magnitudes ``absmax [K]``.

    A channel that was always zero, or that no weight reads, keeps 1; so that ``s`` stays within what fp16 and bf16 hold
    beside weights and norms, it is scaled to a geometric mean of 1 and cut at 1e-4 and 1e4.
    """
    largest = weight_absmax(weights)
    alive = (absmax > 0) & (largest > 0)
    tiny = torch.finfo(torch.float32).tiny
    logs = alpha * absmax.clamp(min=tiny).log() - (1 - alpha) * largest.clamp(min=tiny).log()
    if bool(alive.any()):
        logs = logs - logs[alive].mean()
    s = logs.exp().clamp(1e-4, 1e4)
    return torch.where(alive, s, torch.ones_like(s))


def weight_absmax(weights: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of each column over all of them, fp32 [K]."""
    parts = [torch.maximum(w.amax(dim=0), -w.amin(dim=0)).float() for w in weights]
    return torch.stack(parts).amax(dim=0)


def smooth(
    observer: Observer,
    weights: Sequence[Tensor],
    schemes: Sequence[Scheme],
    alpha: float | str | None,
    *,
    given: Tensor | None = None,
) -> Smoothed:
    """The divisor (and the static scale and shift, where a scheme is static) of one input and the linears that read it.

    ``alpha`` is a number, None for no smoothing, or "auto": the one of :data:`GRID` with the least error of the
    layers' output on the rows that the observer kept. Static scales are searched over :data:`CLIPS` either way, and where values
    lie to one side of zero, each with its codes about the middle of them as well: asymmetric, a zero point.
    ``given`` is a divisor that the weights already expect; alpha must be None then. "auto" also rotates int8 activations where
    that pays.
    """
    layer = _Layer(observer, [_spread(w, ROWS // len(weights)) for w in weights], schemes, given)
    rotatable = alpha == "auto" and can_be_rotated(observer.k) and all(sc.activation != "a16" for sc in schemes)
    best = min((layer.attempt(*each, rotate=False) for each in _divisors(observer, weights, alpha)), key=layer.cost)
    if rotatable and layer.cost(best) > ROTATION_PAYS:
        turned = min(
            (layer.attempt(*each, rotate=True) for each in _divisors(observer, weights, alpha)), key=layer.cost
        )
        if layer.cost(turned) <= ROTATION_SAVES * layer.cost(best):
            best = turned
    return best if given is None else replace(best, divisor=given)


class _Layer:
    """Some outputs of the linears that read one input, on the rows that were kept of it."""

    def __init__(
        self, observer: Observer, parts: list[Tensor], schemes: Sequence[Scheme], given: Tensor | None
    ) -> None:
        self.rows, self.counts = observer.weighted_rows()
        self.low, self.high = observer.low, observer.high
        if given is not None:
            self.rows, self.low, self.high = self.rows / given, self.low / given, self.high / given
        self.parts, self.schemes = parts, schemes
        self.extremes = observer.extremes.shape[0]
        self.clip = observer.clip() if given is None else None  # of the input as it was seen
        self.outputs = [self.rows @ part.t() for part in parts]
        self.energy = torch.stack([y.square().sum(dim=1) for y in self.outputs]).sum(dim=0).clamp_(min=1e-12)
        self.static = any(scheme.activation == "a8-static" for scheme in schemes)

    def cost(self, found: Smoothed) -> float:
        return found.error.of(self.static)

    def attempt(self, alpha: float | None, s: Tensor | None, *, rotate: bool) -> Smoothed:
        """With the divisor ``s``, and the best of a few static quantizers where one is wanted."""
        flat = self.rows if s is None else self.rows / s
        flat = rotated(flat) if rotate else flat
        codes = [_codes(w, s, rotate, scheme) for w, scheme in zip(self.parts, self.schemes, strict=True)]
        if not self.static:
            return Smoothed(alpha, s, None, self._error(flat, codes, None, 0.0), rotate)
        tried = [
            Smoothed(alpha, s, scale, self._error(flat, codes, scale, shift), rotate, shift)
            for scale, shift in self._quantizers(flat, s, rotate)
        ]
        best = min((found for found in tried if not found.shift), key=self.cost)
        shifted = min((found for found in tried if found.shift), key=self.cost, default=best)
        return shifted if self.cost(shifted) <= SHIFT_SAVES * self.cost(best) else best

    def _quantizers(self, flat: Tensor, s: Tensor | None, rotate: bool) -> list[tuple[float, float]]:
        """Static scales and shifts of ``flat`` that are tried. What is rotated lies about zero."""
        if rotate:
            low, high = -float(flat.abs().max()), float(flat.abs().max())
        else:
            low = float((self.low if s is None else self.low / s).min())
            high = float((self.high if s is None else self.high / s).max())
        peak = max(high, -low, 1e-30)
        cuts = [peak * clip for clip in CLIPS]
        if s is None and not rotate and self.clip is not None:
            cuts.append(max(self.clip, 1e-30))
        found = [(cut / 127, 0.0) for cut in cuts]
        for cut in cuts:
            bottom, top = max(low, -cut), min(high, cut)
            if top - bottom <= ONE_SIDED * 2 * cut:
                found.append((max(top - bottom, 1e-30) / 254, (top + bottom) / 2))
        return found

    def _error(self, flat: Tensor, codes: list[Tensor], scale: float | None, shift: float) -> Error:
        errors = torch.zeros(len(flat))
        for w, y, scheme in zip(codes, self.outputs, self.schemes, strict=True):
            errors += (fake_quantize(flat, scheme, scale, shift) @ w.t() - y).square().sum(dim=1)
        relative = errors / self.energy
        mean = float((relative * self.counts).sum() / self.counts.sum())
        return Error(mean, float(relative[-self.extremes :].mean()))


def _codes(weight: Tensor, s: Tensor | None, rotate: bool, scheme: Scheme) -> Tensor:
    """What the codes of ``weight * s``, rotated or not, stand for; fp32."""
    if scheme.weight is None:
        return weight
    scaled = weight if s is None else weight * s
    return rtn(rotated(scaled) if rotate else scaled, scheme.weight).dequantize()


def _divisors(
    observer: Observer, weights: Sequence[Tensor], alpha: float | str | None
) -> Iterator[tuple[float | None, Tensor | None]]:
    """The alphas to try, and their divisors."""
    for candidate in GRID if alpha == "auto" else (alpha,):
        yield candidate, None if candidate is None else divisor(observer.absmax, weights, float(candidate))  # type: ignore[misc]


def fake_quantize(x: Tensor, scheme: Scheme, scale: float | None, shift: float = 0.0) -> Tensor:
    """What a linear of ``scheme`` multiplies in place of ``x [M, K]``, fp32; ``scale`` and ``shift`` are a static scheme's."""
    if scheme.activation == "a16":
        return x.float()
    if scheme.activation == "a8-static":
        assert scale is not None
        values, _ = quantize_by_scale(x, scale, shift)
        return values * scale + shift
    k = x.shape[1]
    length = k
    if scheme.activation == "a8-token-group" and scheme.weight is not None and scheme.weight.group:
        length = scheme.weight.group
    values, scales = quantize_activation(x, length)
    return values * scales.repeat_interleave(length, dim=1)[:, :k]


def _spread(weight: Tensor, count: int) -> Tensor:
    """``count`` rows of ``weight [N, K]``, evenly spread, fp32; all of them if there are fewer."""
    n = weight.shape[0]
    if n <= count:
        return weight.float()
    return weight[torch.linspace(0, n - 1, count).long()].float()
