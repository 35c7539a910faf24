"""``qpass.quantize``: find good codes for a model's weights with a calibration; ``qpass.compile`` then uses them."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.algorithms.awq import awq, search
from qpass.algorithms.clip import clip
from qpass.algorithms.gptq import DAMPING, aligned, factor, gptq
from qpass.algorithms.rtn import rtn
from qpass.assignment import Assignment
from qpass.errors import OptionError
from qpass.frontends import progress
from qpass.frontends.batches import read_batches
from qpass.frontends.blocks import Blocks, split
from qpass.frontends.layers import Layer, layers_of
from qpass.frontends.moments import Moments, Watch, check_finite, inputs_of, siblings
from qpass.frontends.resume import Finished, fingerprint
from qpass.lowering.given import Given, give, hash_of
from qpass.qweight import QWeight

ALGORITHMS = ("gptq", "awq", "awq+gptq", "clip", "rtn")
DATA_FREE = frozenset({"clip", "rtn"})

FEWEST_TOKENS = 128
"""Fewer say nothing of a layer's inputs; tens of thousands are usual."""

TARGETS = 0.25
"""How far a layer is aimed at what the original model computes: all the way it makes good once more what layers before it made good."""

OVERFIT = 0.25
"""Damping of GPTQ by inputs a token, where that is more than the paper's: compensation fits the noise of a small calibration."""


def quantize(
    model: nn.Module,
    batches: Any = None,
    *,
    scheme: Any = "w4a16-g128",
    algorithm: str = "gptq",
    exclude: Any = (),
    tokenizer: Any = None,
    length: int = 512,
    count: int | None = 64,
    folder: str | Path | None = None,
    write_back: bool = False,
) -> nn.Module:
    """Find the codes of ``model``'s linear layers, for :func:`qpass.compile` to use; returns the model.

    batches    what to calibrate on: None (the standard library's source) or the path of a text file or folder, which need
               a ``tokenizer``; an int64 tensor [n, length]; a DataLoader or an iterable of tensors, mappings or strings.
               ``length`` and ``count``: tokens a window, and windows or batches at most
    scheme, exclude  as for ``qpass.compile``: one name, a table by module pattern, or a function; patterns to leave out
    algorithm  "gptq" (rounding errors made good by later columns), "awq" (loud inputs get finer weights), "awq+gptq" (both),
               "clip" (ranges clipped where the squared error is least) and "rtn"; the last two need no batches. "clip" is for
               2 and 3 bits: at 4 it may lose more than "rtn" (it did on SmolLM2), since outliers often matter most
    folder     keeps each finished block; called again with the same arguments, the work goes on behind the last one
    write_back  overwrite the weights with the values that their codes stand for, for eager use. By default they stay the
               originals: only graphs that are compiled afterwards use the codes.

    The layers are quantized one after the other, each calibrated on what the quantized ones before it give, and aimed a
    quarter of the way at what the original model computes there. Held besides the model are one layer's second moments, the calibration's hidden
    states in both models, what one block's layers read in the original, and the codes (up to four bits: half a byte a
    weight). Interrupted, the model is as it was. A model that isn't a chain of blocks is calibrated in one go, with the
    moments of all layers held at once and each layer aimed at its own inputs.
    Layers outside of the blocks (the output head) are rounded without data. Codes keep their scheme whatever scheme
    ``qpass.compile`` is called with; ``exclude`` there still leaves a layer as it is. Experts' 3-D weights are left as they
    are, with a warning.

    Raises OptionError, SchemeError, UnsupportedError, CheckpointError (a damaged file in ``folder``).
    """
    if algorithm not in ALGORITHMS:
        raise OptionError(f"unknown algorithm {algorithm!r}; accepted: {', '.join(ALGORITHMS)}")
    assignment = Assignment.make(scheme, exclude)
    linears = layers_of(model, assignment)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if algorithm in DATA_FREE:
                _without_data(linears, algorithm, write_back)
            else:
                data = _read(model, batches, tokenizer, length, count)
                settings = {
                    "algorithm": algorithm,
                    "targets": TARGETS,
                    "schemes": {linear.name: str(linear.scheme) for linear in linears},
                }
                finished = Finished(Path(folder), fingerprint(model, settings, data)) if folder is not None else None
                _with_data(model, linears, data, algorithm, finished, write_back)
    finally:
        model.train(training)
    return model


def _with_data(
    model: nn.Module,
    linears: list[Layer],
    data: list[tuple[tuple, dict]],
    algorithm: str,
    finished: Finished | None,
    write_back: bool,
) -> None:
    blocks = split(model, data)
    given: dict[str, Given] = {}
    masks = [_mask(kwargs) for _, kwargs in data]
    inside = [[x for x in linears if _within(x.name, name)] for name in blocks.names]
    total = sum(2 * len(data) + len(own) for own in inside) - len(data)  # behind the last block nothing needs to run
    with progress.calibrating(total) as step:
        for index, own in enumerate(inside):
            label = blocks.names[index] or type(model).__name__
            found = finished.load(index, {x.name: x.format for x in own}) if finished is not None else None
            if found is None:
                found = _quantize_block(blocks, index, own, masks, algorithm, lambda: step(1, label))  # noqa: B023
                if finished is not None:
                    finished.save(index, found)
            else:
                for batch in range(len(data) if index + 1 < len(inside) else 0):
                    blocks.run_original(index, batch)
                step(len(data) + len(own), label)
            if index + 1 < len(inside):
                with _standing_in(own, found):
                    blocks.advance(index, lambda: step(1, label))  # noqa: B023
            given |= {name: replace(one, read=_held(one.read())) for name, one in found.items()}
    for linear in linears:  # all at the end: interrupted, nothing has changed
        if linear.name in given:
            if write_back:
                linear.write(_values(given[linear.name]))
            values, activation = hash_of(linear.parameter), linear.scheme.activation
            give(linear.parameter, replace(given[linear.name], activation=activation, values=values))
    _without_data([x for x in linears if x.name not in given], "rtn", write_back)


def _quantize_block(
    blocks: Blocks,
    index: int,
    linears: list[Layer],
    masks: Sequence[Tensor | None],
    algorithm: str,
    step: Callable[[], None],
) -> dict[str, Given]:
    """Codes of a block's linears, those that read one input at a time, in the order in which they run.

    What comes later in the block reads what the quantized ones before it give, and is to give what the original model's
    gives (GPTAQ, 2504.02692). Held are the inputs of all of the block's linears in the original model.
    """
    by_name = {linear.name: linear for linear in linears}
    groups = siblings([(x.name, x.module) for x in linears], partial(blocks.run, index, 0))
    readers = {names[0]: [by_name[name] for name in names] for names in groups}
    firsts = [(name, own[0].module, own[0].k) for name, own in readers.items()]
    originals: list[dict[str, Tensor]] = [{} for _ in masks]
    for batch in range(len(masks)):
        if not blocks.is_whole:
            run = partial(blocks.run_original, index, batch)
            originals[batch] = inputs_of([(name, module) for name, module, _ in firsts], run)
        step()
    found: dict[str, Given] = {}
    with ExitStack() as quantized:
        for together in [firsts] if blocks.is_whole else [[first] for first in firsts]:
            moments = _watched(blocks, index, together, masks, originals)
            for name, _, _ in together:
                own = readers[name]
                weights, divisor = _solve(own, moments.pop(name), algorithm)
                for linear, weight in zip(own, weights, strict=True):
                    found[linear.name] = Given.of(weight, divisor=divisor, source=algorithm)
                    step()
                if not blocks.is_whole:
                    quantized.enter_context(_standing_in(own, found))
    return found


def _watched(
    blocks: Blocks,
    index: int,
    linears: list[tuple[str, nn.Module, int]],
    masks: Sequence[Tensor | None],
    originals: list[dict[str, Tensor]],
) -> dict[str, Moments]:
    """What the linears read, over all batches; their originals are spent."""
    watch = Watch(linears)
    try:
        for batch, mask in enumerate(masks):
            mine = {name: x for name, _, _ in linears if (x := originals[batch].pop(name, None)) is not None}
            watch.run(partial(blocks.run, index, batch), mask, mine)
    finally:
        watch.close()
    return watch.moments


def _solve(linears: list[Layer], seen: Moments, algorithm: str) -> tuple[list[QWeight], Tensor | None]:
    """Codes of the linears that share one input, and the divisor that they want of it."""
    formats = [linear.format for linear in linears]
    weights = [linear.read().float() for linear in linears]
    amplitude, hessian, drift = seen.amplitude(), seen.hessian(), seen.drift()
    check_finite(hessian, linears[0].name)
    damping = min(1.0, max(DAMPING, OVERFIT * len(hessian) / max(1, seen.rows)))
    rounds = partial(gptq, damping=damping, grid="clipped")
    try:
        if drift is not None:
            shared = factor(hessian, damping=damping)
            weights = [aligned(w, drift, shared, TARGETS) for w in weights]
        if algorithm == "awq":
            return awq(weights, amplitude, hessian, formats, damping=damping)
        divisor = None
        if algorithm == "awq+gptq":
            divisor = search(weights, amplitude, hessian, formats, rounds, damping=damping)
            hessian = hessian / divisor[:, None] / divisor
            weights = [w * divisor for w in weights]
        if drift is None or divisor is not None:
            shared = factor(hessian, damping=damping)
        return [rounds(w, shared, format) for w, format in zip(weights, formats, strict=True)], divisor
    except ValueError as error:
        raise OptionError(f"{', '.join(linear.name for linear in linears)}: {error}") from error


def _without_data(linears: list[Layer], algorithm: str, write_back: bool) -> None:
    """Codes that are found when they are first packed: they depend on the weight alone."""
    for linear in linears:
        source = "clip" if algorithm == "clip" and linear.format.bits < 8 else "rtn"
        find = clip if source == "clip" else rtn
        if write_back:
            linear.write(find(linear.read(), linear.format).dequantize())
        # Weakly: what is given must not keep its Parameter alive.
        parameter, format, transposed = weakref.ref(linear.parameter), linear.format, linear.transposed

        def read(parameter=parameter, format=format, transposed=transposed, find=find) -> QWeight:  # type: ignore[no-untyped-def]
            weight = parameter().detach()
            return find(weight.t() if transposed else weight, format)

        give(linear.parameter, Given(format, read, activation=linear.scheme.activation, source=source))


@contextmanager
def _standing_in(linears: list[Layer], found: Mapping[str, Given]) -> Iterator[None]:
    """The linears with the values that their codes stand for, for a while."""
    originals = [linear.parameter.data for linear in linears]  # swapped, not overwritten: they may be a mapped file's
    try:
        for linear in linears:
            weight = _values(found[linear.name])
            linear.parameter.data = (weight.t() if linear.transposed else weight).to(linear.parameter.dtype)
        yield
    finally:
        for linear, original in zip(linears, originals, strict=True):
            linear.parameter.data = original


def _values(given: Given) -> Tensor:
    weight = given.read().dequantize()
    return weight if given.divisor is None else weight / given.divisor


def _held(weight: QWeight) -> Callable[[], QWeight]:
    """Codes of up to four bits held two a byte until somebody reads them."""
    if weight.format.bits > 4 or weight.k % 2:
        return lambda: weight
    pairs = weight.codes[:, 0::2] | weight.codes[:, 1::2] << 4
    scales, zeros, format = weight.scales, weight.zeros, weight.format
    return lambda: QWeight(torch.stack([pairs & 15, pairs >> 4], dim=2).view(len(pairs), -1), scales, zeros, format)


def _read(model: nn.Module, source: Any, tokenizer: Any, length: int, count: int | None) -> list[tuple[tuple, dict]]:
    """Arguments of the model's forward, a batch each."""
    if "input_ids" in inspect.signature(model.forward).parameters:
        data: list[tuple[tuple, dict]] = [
            ((), dict(batch)) for batch in read_batches(source, tokenizer, length=length, count=count)
        ]
        tokens = sum(int(mask.sum()) if (mask := _mask(b)) is not None else b["input_ids"].numel() for _, b in data)
        if tokens < FEWEST_TOKENS:
            raise OptionError(f"the calibration has {tokens} tokens; at least {FEWEST_TOKENS} are needed")
        return data
    if not isinstance(source, Sequence) or isinstance(source, str) or not len(source):
        raise OptionError(
            f"{type(model).__name__} takes no input_ids: its batches are a list of tensors, tuples or mappings, the arguments "
            "of its forward"
        )
    return [
        ((), dict(item))
        if isinstance(item, Mapping)
        else (tuple(item) if isinstance(item, tuple | list) else (item,), {})
        for item in source[:count]
    ]


def _mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of a batch are real, bool [B, L]; None for all."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.bool().all()):
        return None
    return mask.bool()


def _within(name: str, block: str) -> bool:
    return not block or name == block or name.startswith(f"{block}.")
