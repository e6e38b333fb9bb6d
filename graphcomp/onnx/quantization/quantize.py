"""A float file becomes an 8 bit file beside it, which is checked, and raced against it.

one pass of statistics -> a QDQ model for each range -> the best -> its layers checked -> race -> file
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from graphcomp.base import Progress, atomic_file, quiet, remove
from graphcomp.data import Split
from graphcomp.errors import DataError, ExportError
from graphcomp.measure import paired_difference
from graphcomp.onnx.quantization import checks
from graphcomp.onnx.quantization.grids import Grid
from graphcomp.onnx.quantization.layers import Layer, find_layers
from graphcomp.onnx.quantization.qdq import Choice, write_qdq
from graphcomp.onnx.quantization.ranges import Statistics, collect
from graphcomp.onnx.quantization.sessions import Feeds
from graphcomp.records import Interval, Quantized, QuantizedLayer
from graphcomp.runtime import adds_in_int16, onnxfile, race

PERCENTILES = (None, 99.999, 99.99)
"""Ranges that are tried: all values, and what holds this many per cent of them."""
SAMPLES = 256
_HELD = 4  # of so many samples one is held out
_BATCH = 8  # all tensors of a batch are in memory at once
_GRIDS = ("pairs", "plain", "reduced")


def quantize_onnx(
    path: str | Path,
    out: str | Path,
    samples: Split,
    *,
    grid: Grid | None = None,
    evaluate: Split | None = None,
    threads: int = 1,
    faster_only: bool = True,
    progress: Progress = quiet,
) -> Quantized:
    """Write the float32 ONNX file `path` with 8 bit weights and activations to `out`.

    For CPUs: QuantizeLinear and DequantizeLinear around layers, which ONNX Runtime fuses; u8 asymmetric
    activations, s8 symmetric weights with a scale an output channel, int32 biases that keep the means of
    outputs. Ranges of activations are those of the `PERCENTILES` that leave the outputs the best signal to
    noise on held-out samples. Every fused layer is compared with itself as written, on samples and on inputs
    of 0 and 255: more than one step of its output apart is what silent saturation looks like, and refused.
    `path` must have one input and its batch normalisations folded (the pass `fold-bn`); it stays as it is.

    Args:
        path: a file of one piece with float32 weights.
        out: replaced if it exists; removed if the 8 bit file is not written.
        samples: 256 of them are used, evenly spaced; a quarter is held out.
        grid: `pairs` (no two neighbouring taps can saturate int16, on any x86), `plain` (8 bit, for
            processors with VNNI or ARM), `reduced` (7 bit). None: what this machine needs, and 7 bit should
            that not be enough.
        evaluate: labelled samples that both files classify, for the difference in accuracy; None: none.
        threads: of the race.
        faster_only: write `out` only if it is faster here at one sample; False: without a race, in any case.
        progress: told which step is due.

    Returns:
        Choices, signal to noise, distances, times, and what is to be shipped.

    Raises:
        ExportError: if the file cannot be quantised, naming the node, or a fused layer computes something
            else.
        DataError: without enough samples, or of another shape.
        BenchError: if the runtime refuses the file.
        OutputError: if `out` cannot be written.
    """
    path, out = Path(path), Path(out)
    if grid is not None and grid not in _GRIDS:
        raise ExportError(f"grid: found {grid!r}, expected one of {', '.join(_GRIDS)}")
    if out.exists() and out.samefile(path):
        raise ExportError(f"{out}: found the float file itself, expected another; it stays as it is")
    model, batch = _read(path)
    layers, left = find_layers(model)
    if not layers:
        raise ExportError(f"{path}: found no layer with constant float32 weights, expected one to quantise")
    fitted, held = _feeds(model, samples, batch)
    progress("look at ranges", 0.1)
    work = _Work(
        model, layers, collect(model, layers, fitted), held, _outputs(model.SerializeToString(), held)
    )
    progress("choose ranges and check layers", 0.4)
    found = _checked(work, grid, left)
    content = found.model.SerializeToString()
    operators, in_float = checks.census(found.model)
    shown = dict.fromkeys(in_float, "the runtime fused nothing there") | left | found.left
    times = None
    if faster_only:
        progress("race", 0.8)
        one = {name: x[: min(len(x), batch or 1)] for name, x in held[0].items()}
        times = race([model.SerializeToString(), content], one, "cpu", threads)
    wins = times is None or times[1] < times[0]
    if wins:
        with atomic_file(out) as temporary:
            temporary.write_bytes(content)
    elif out.is_file():
        remove(out)
    by_layer = checks.snr_by_tensor(model, found.model, found.layers, held[:2])
    return Quantized(
        path=str(out) if wins else None,
        shipped="int8" if wins else "float32",
        why=_why(times),
        float_bytes=path.stat().st_size,
        int8_bytes=len(content),
        grid=found.choice.grid,
        percentile=found.choice.percentile,
        tried_db=found.tried,
        snr_db=max(found.tried.values()),
        samples=_count(fitted),
        held_out=_count(held),
        layers=[
            QuantizedLayer(
                name=layer.name, snr_db=by_layer.get(layer.name), steps=found.steps.get(layer.name)
            )
            for layer in found.layers
        ],
        in_float=shown,
        operators=operators,
        float_ms=times[0] if times else None,
        int8_ms=times[1] if times else None,
        accuracy=_accuracy(model, content, evaluate, batch) if evaluate is not None else None,
    )


@dataclass(frozen=True, eq=False)
class _Work:
    """What all attempts at a file share."""

    model: ModelProto
    layers: Sequence[Layer]
    statistics: Statistics
    held: Sequence[Feeds]
    expected: list[NDArray[Any]]


@dataclass(frozen=True, eq=False)
class _Found:
    """An attempt: the model, what was chosen, dB by range, distances by layer, and what it left in float."""

    model: ModelProto
    choice: Choice
    tried: dict[str, float]
    steps: dict[str, int]
    layers: Sequence[Layer]
    left: dict[str, str]

    @property
    def wrong(self) -> list[str]:
        """Layers that compute something else."""
        return [name for name, steps in self.steps.items() if steps > 1]


def _checked(work: _Work, grid: Grid | None, left: Mapping[str, str]) -> _Found:
    """With the grid that was asked for; else that of this machine, and 7 bit, and wrong layers in float."""
    if grid is not None:
        found = _attempt(work, grid, left, {})
    else:
        found = _attempt(work, "pairs" if adds_in_int16() else "plain", left, {})
        if found.wrong:
            found = _attempt(work, "reduced", left, {})
        if found.wrong:
            why = dict.fromkeys(
                found.wrong, "its fused kernel computes something else than the layer as written"
            )
            found = _attempt(work, "reduced", left, why)
    if found.wrong:
        worst = max(found.wrong, key=lambda name: found.steps[name])
        raise ExportError(
            f"{worst}: found its fused kernel {found.steps[worst]} steps of its output away from the layer "
            f"as written "
            f"(and {len(found.wrong) - 1} more), expected at most 1; with the grid {found.choice.grid!r} "
            f"sums saturate "
            "on this machine; use pairs or reduced"
        )
    return found


def _attempt(work: _Work, grid: Grid, left: Mapping[str, str], wrong: Mapping[str, str]) -> _Found:
    choices = [Choice(p, grid, in_float=(*left, *wrong)) for p in PERCENTILES]
    layers = [layer for layer in work.layers if layer.name not in wrong]
    made = [write_qdq(work.model, layers, work.statistics, choice) for choice in choices]
    decibels = [checks.snr(work.expected, _outputs(m.SerializeToString(), work.held)) for m in made]
    best = max(range(len(made)), key=decibels.__getitem__)
    names = ["MinMax" if p is None else f"{p} %" for p in PERCENTILES]
    steps = checks.errors_by_layer(made[best], layers, work.held[0])
    tried = dict(zip(names, decibels, strict=True))
    return _Found(made[best], choices[best], tried, steps, layers, dict(wrong))


def _read(path: Path) -> tuple[ModelProto, int | None]:
    """The model, and its batch where it is not open."""
    onnxfile.read(path)
    model = onnx.load(path, load_external_data=False)
    if any(i.data_location == TensorProto.EXTERNAL for i in model.graph.initializer):
        raise ExportError(f"{path}: found weights in other files, expected one file; save it as one")
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise ExportError(
            f"{path}: found QuantizeLinear, expected a float file; quantise what it was made of"
        )
    stored = {i.name for i in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in stored]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != TensorProto.FLOAT:
        raise ExportError(
            f"{path}: found inputs {', '.join(i.name for i in inputs)}, expected one, of float32; samples "
            f"have one"
        )
    dims = inputs[0].type.tensor_type.shape.dim
    return model, (dims[0].dim_value or None) if dims else None


def _feeds(model: ModelProto, samples: Split, batch: int | None) -> tuple[list[Feeds], list[Feeds]]:
    """Batches to take statistics of, and batches that are held out."""
    size = batch or _BATCH
    chosen = samples.spread(SAMPLES)
    held = np.arange(_HELD - 1, len(chosen), _HELD)
    fitted = np.setdiff1d(np.arange(len(chosen)), held)
    if min(len(held), len(fitted)) < size:
        raise DataError.at("samples", len(samples), f"at least {_HELD * size}", "calibrate on more")
    return _batches(model, chosen.subset(fitted), size), _batches(model, chosen.subset(held), size)


def _batches(model: ModelProto, split: Split, size: int) -> list[Feeds]:
    """All whole batches: a file may take no other."""
    name = _input(model)
    found = [x.numpy() for x, _ in split.batches(size) if len(x) == size]
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    shape = found[0].shape
    if len(shape) != len(dims) or any(d and d != n for d, n in zip(dims[1:], shape[1:], strict=True)):
        raise DataError.at("samples", "x".join(map(str, shape[1:])), f"{name} of {dims[1:]}", "give others")
    return [{name: x} for x in found]


def _input(model: ModelProto) -> str:
    stored = {i.name for i in model.graph.initializer}
    return str(next(i.name for i in model.graph.input if i.name not in stored))


def _count(batches: Sequence[Feeds]) -> int:
    return sum(len(x) for feeds in batches for x in feeds.values())


def _outputs(model: bytes, batches: Sequence[Feeds]) -> list[NDArray[Any]]:
    """All float outputs on all batches."""
    outputs = [y for batch in checks.run_all(model, batches) for y in batch]
    return [y for y in outputs if y.dtype == np.float32]


def _accuracy(model: ModelProto, content: bytes, split: Split, batch: int | None) -> Interval:
    """How many more, or fewer, of the same samples the 8 bit model gets right."""
    if not split.labelled or split.regression:
        raise DataError.at("evaluate", split.labels.dtype, "classes", "give labelled samples")
    size = batch or math.gcd(len(split), 16)  # open batches leave no sample out
    batches = _batches(model, split, size)
    labels = split.labels.numpy()[: len(batches) * size]
    right = [
        np.concatenate([y[0].argmax(1) for y in checks.run_all(each, batches)]) == labels
        for each in (model.SerializeToString(), content)
    ]
    return paired_difference(*right)


def _why(times: Sequence[float] | None) -> str:
    if times is None:
        return "no race was asked for"
    ratio = times[0] / times[1]
    if ratio > 1:
        return f"8 bit is {ratio:.2f} times as fast here, {times[1]:.3g} ms for {times[0]:.3g} ms"
    return f"8 bit is not faster here, {times[1]:.3g} ms for {times[0]:.3g} ms: ship the float file"
