"""A float file becomes an 8 bit file beside it, which is checked, and raced against it.

channels spread -> one pass of statistics -> a QDQ model for each range -> the best -> its weights rounded for
the samples -> its layers checked -> layers that cost no time back to float -> race -> file
"""

import fnmatch
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto

from graphcomp.base import Progress, atomic_file, part, quiet, remove
from graphcomp.data import Split
from graphcomp.errors import BenchError, ExportError, first_line
from graphcomp.onnx.half import with_full_weights
from graphcomp.onnx.quantization import checks
from graphcomp.onnx.quantization.attempts import Work, checked, give_back
from graphcomp.onnx.quantization.grids import GRIDS, Grid
from graphcomp.onnx.quantization.layers import Layer, find_layers
from graphcomp.onnx.quantization.qdq import Choice, saturating, write_qdq
from graphcomp.onnx.quantization.ranges import collect
from graphcomp.onnx.quantization.samples import (
    calibration,
    compare,
    counted,
    outputs,
    require_classes,
)
from graphcomp.onnx.quantization.sessions import Feeds
from graphcomp.onnx.quantization.spreading import find_factors, spread
from graphcomp.onnx.subgraphs import required_inputs
from graphcomp.records import Bench, Kernels, Plan, Quantized, QuantizedLayer
from graphcomp.runtime import Provider, adds_in_int16, benchmark, onnxfile, race

SAMPLES = 256


def quantize_onnx(
    path: str | Path,
    out: str | Path,
    samples: Split,
    *,
    grid: Grid | None = None,
    count: int = SAMPLES,
    exclude: Sequence[str] = (),
    evaluate: Split | None = None,
    threads: int = 1,
    batches: Sequence[int] = (1,),
    runs: int = 200,
    seconds: float = 10.0,
    providers: Sequence[Provider] = ("cpu",),
    faster_only: bool = True,
    kernels: Kernels = "cpu",
    progress: Progress = quiet,
) -> Quantized:
    """Write the float32 ONNX file `path` with 8 bit weights and activations to `out`.

    For CPUs: QuantizeLinear and DequantizeLinear around layers, which ONNX Runtime fuses; u8 asymmetric
    activations, s8 symmetric weights with a scale an output channel, int32 biases that keep the means of
    outputs. Ranges of activations are those of `attempts.SHARES` that leave the outputs the best signal to
    noise on held-out samples. Weights are rounded for the outputs of their layers to change least on the
    other samples (see `compensation`), where that helps the held-out ones. Every fused layer is compared
    with itself as written, on samples and on inputs of 0 and 255: more than one step of its output apart is
    what silent saturation looks like, and refused. Layers that do the outputs most harm go back to float
    while that takes no time.
    `path` must have its batch normalisations folded (the pass `fold-bn`); it stays as it is.

    Args:
        path: a file of one piece with float32 weights, which may be stored as float16.
        out: replaced if it exists; removed if the 8 bit file is not written.
        samples: `count` of them are used, evenly spaced; a quarter is held out.
        grid: `pairs` (no two neighbouring taps can saturate int16, on any x86), `plain` (8 bit, for
            processors with VNNI or ARM), `reduced` (7 bit). None: what this machine needs, and 7 bit should
            that not be enough.
        count: of samples, at least 32.
        exclude: globs on names of nodes that stay in float.
        evaluate: labelled samples that both files classify, for the difference in accuracy; None: none.
        threads, batches, runs, seconds: of the race, as in `benchmark`.
        providers: the runtimes of the race; both files run in each. The first one decides about layers.
        faster_only: write `out` only if it is faster here, and in none of them slower; False: without a race,
            in any case, and no layer goes back to float.
        kernels: `tensorrt` writes the file in TensorRT's terms: s8 activations without zero points, weights
            that are rounded in the file, float biases, additions of 8 bit tensors. What the outputs lose is
            then measured on the file as written, on the CPU; nothing fused is compared. Times are those of
            `providers`: (`tensorrt`,), or give faster_only=False.
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
    timing = Timing(threads, tuple(batches), runs, seconds, tuple(providers)) if faster_only else None
    return quantize_file(
        Path(path),
        Path(out),
        samples,
        grid=grid,
        count=count,
        exclude=exclude,
        evaluate=evaluate,
        timing=timing,
        kernels=kernels,
        progress=progress,
    )[0]


@dataclass(frozen=True)
class Timing:
    """How both files are timed, see `benchmark`."""

    threads: int = 1
    batches: tuple[int, ...] = (1,)
    runs: int = 200
    seconds: float = 10.0
    providers: tuple[Provider, ...] = ("cpu",)


def quantize_file(
    path: Path,
    out: Path,
    samples: Split,
    *,
    grid: Grid | None = None,
    own: Grid | None = None,
    count: int = SAMPLES,
    exclude: Sequence[str] = (),
    evaluate: Split | None = None,
    timing: Timing | None,
    kernels: Kernels = "cpu",
    progress: Progress = quiet,
) -> tuple[Quantized, Choice]:
    """As `quantize_onnx`, with what it decided.

    `own`: the grid of the machine that the file is for, which is tried first where `grid` does not say; None:
    of this one. Where it is `pairs` no other one may saturate there, whatever this machine does. `timing`:
    None for no race, and the file in any case.
    """
    _check_request(path, out, grid)
    if timing is not None and kernels != "cpu" and set(timing.providers) != {kernels}:
        raise ExportError(
            f"{out}: found a race in {', '.join(timing.providers)} of a file in the terms of {kernels}, "
            f"expected one in {kernels} alone; give it, or no benchmark (--no-bench, faster_only=False)"
        )
    if evaluate is not None:
        require_classes(evaluate)
    model, batch = _read(path)
    layers, left = _layers(model, exclude, path)
    fitted, held = calibration(model, samples, count, batch)
    progress("look at ranges", 0.1)
    before = model.SerializeToString()
    expected = outputs(before, held)
    if not expected:
        raise ExportError(
            f"{path}: found no float32 output, expected one, by which ranges are chosen and the loss is "
            "judged; export what the last layer yields as well"
        )
    factors = find_factors(model, layers, fitted)
    model, layers = spread(model, layers, factors)
    statistics = collect(model, layers, fitted)
    boundless = [x.name for x in layers if not statistics.infinite.isdisjoint((x.x, x.y))]
    left |= dict.fromkeys(boundless, "infinities on the calibration samples")
    layers = [layer for layer in layers if layer.name not in boundless]
    work = Work(model, layers, left, fitted, statistics, held, expected, factors, kernels)
    progress("choose ranges and check layers", 0.3)
    here: Grid = "pairs" if kernels == "cpu" and adds_in_int16() else "plain"
    found = checked(work, grid, own or here)
    unsafe = saturating(model, found.layers, found.choice)
    if unsafe and own == "pairs":
        raise ExportError(
            f"{unsafe[0]}: found weights whose sums can saturate on x86 without VNNI, which the target is "
            f"(and {len(unsafe) - 1} more), expected none; no check on a machine with VNNI sees it; use "
            f"another grid than {found.choice.grid}, pairs or reduced, or a target with VNNI"
        )
    benches, refused = list[Bench](), dict[str, str]()
    if timing is not None:
        progress("try layers in float", 0.5)
        one = {name: x[: batch or 1] for name, x in held[0].items()}
        found = give_back(work, found, partial(_times, one, timing))
        if batch is not None:
            timing = replace(timing, batches=(batch,))
        benches, refused = _races(
            path, out, found.model.SerializeToString(), one, timing, part(progress, 0.7, 0.2)
        )
    content = found.model.SerializeToString()
    wins = timing is None or _wins(benches, refused)
    if wins:
        with atomic_file(out) as temporary:
            temporary.write_bytes(content)
    elif out.is_file():
        remove(out)
    progress("compare with the float file", 0.9)
    operators, unfused = checks.census(found.model, found.layers) if kernels == "cpu" else ({}, [])
    by_layer = checks.snr_by_tensor(model, found.model, found.layers, held[:2])
    score, accuracy = (
        (None, None)
        if evaluate is None
        else compare(before, content, model, evaluate, batch, plain=kernels != "cpu")
    )
    record = Quantized(
        path=str(out) if wins else None,
        source=str(path),
        shipped="int8" if wins else "float32",
        why=_why(benches, refused),
        float_bytes=path.stat().st_size,
        int8_bytes=len(content),
        grid=found.choice.grid,
        percentile=found.choice.percentile,
        tried_db=found.tried,
        snr_db=found.decibels,
        samples=counted(fitted),
        held_out=counted(held),
        layers=[
            QuantizedLayer(name=x.name, snr_db=by_layer.get(x.name), steps=found.steps.get(x.name))
            for x in found.layers
        ],
        in_float=dict.fromkeys(unfused, "the runtime fused nothing there") | dict(found.left),
        given_back=found.given_back,
        operators=operators,
        saturating=saturating(model, found.layers, found.choice) if kernels == "cpu" else [],
        kernels=kernels,
        bench=next(iter(benches), None),
        other_benches=benches[1:],
        not_timed=refused,
        score=score,
        accuracy=accuracy,
    )
    return record, found.choice


def requantize(path: Path, out: Path, plan: Plan) -> None:
    """Write the 8 bit form of `path` that a plan of the pass `quantize` says, to `out`; without data.

    Raises:
        ExportError: if the plan is one for another file, or no such plan.
        OutputError: if `out` cannot be written.
    """
    _check_request(path, out, None)
    model, _ = _read(path)
    layers, left = find_layers(model)
    choice = Choice.of(plan)
    differing = {*choice.layers, *choice.in_float} ^ {*(layer.name for layer in layers), *left}
    if differing:
        raise ExportError(
            f"{path}: found other layers than in the plan ({', '.join(sorted(differing)[:5])}), expected the "
            "file that the plan was made for; quantise anew"
        )
    content = write_qdq(*spread(model, layers, choice.factors), choice).SerializeToString()
    with atomic_file(out) as temporary:
        temporary.write_bytes(content)


def _check_request(path: Path, out: Path, grid: Grid | None) -> None:
    if grid is not None and grid not in GRIDS:
        raise ExportError(f"grid: found {grid!r}, expected one of {', '.join(GRIDS)}")
    if out.exists() and out.samefile(path):
        raise ExportError(f"{out}: found the float file itself, expected another; it stays as it is")


def _layers(model: ModelProto, exclude: Sequence[str], path: Path) -> tuple[list[Layer], dict[str, str]]:
    """Those to quantise; and those that stay in float, and why."""
    layers, left = find_layers(model)
    names = [layer.name for layer in layers]
    for glob in exclude:
        if not fnmatch.filter([*names, *left], glob):
            raise ExportError(
                f"exclude: found no layer that {glob!r} matches, expected one of {', '.join(names[:5])}, …"
            )
    excluded = {name for glob in exclude for name in fnmatch.filter(names, glob)}
    layers = [layer for layer in layers if layer.name not in excluded]
    if not layers:
        raise ExportError(f"{path}: found no layer with constant float32 weights, expected one to quantise")
    return layers, left | dict.fromkeys(sorted(excluded), "excluded")


def _read(path: Path) -> tuple[ModelProto, int | None]:
    """The model, and its batch where it is not open."""
    onnxfile.read(path)
    model = onnx.load(path, load_external_data=False)
    if any(i.data_location == TensorProto.EXTERNAL for i in model.graph.initializer):
        raise ExportError(
            f"{path}: found weights in other files, expected one file, as 8 bits are written; save it as one "
            "where it has less than 2 GB"
        )
    with_full_weights(model)
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise ExportError(
            f"{path}: found QuantizeLinear, expected a float file; quantise what it was made of"
        )
    return model, _batch(path, model)


def _batch(path: Path, model: ModelProto) -> int | None:
    """How many samples the file takes at a time; None for any number."""
    sizes = dict[int, str]()
    for value in required_inputs(model):
        tensor = value.type.tensor_type
        if tensor.elem_type in (TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            kind = TensorProto.DataType.Name(tensor.elem_type)
            raise ExportError(f"{path}: {value.name}: found {kind}, expected FLOAT; export it in float32")
        if not tensor.shape.dim:
            raise ExportError(
                f"{path}: {value.name}: found no axis of samples, expected one; make it constant"
            )
        sizes.setdefault(tensor.shape.dim[0].dim_value, value.name)
    fixed = {size: name for size, name in sizes.items() if size}
    if len(fixed) > 1:
        found = " and ".join(f"{size} of {name}" for size, name in fixed.items())
        raise ExportError(f"{path}: found {found} at a time, expected as many samples of every input")
    return next(iter(fixed), None)


def _races(
    path: Path, out: Path, content: bytes, one: Feeds, timing: Timing, progress: Progress
) -> tuple[list[Bench], dict[str, str]]:
    """The float file against the 8 bit file, which is not yet where it will be, both in every runtime.

    With it the runtimes, ONNX Runtime not among them, that do not compute the 8 bit file, and why.
    """
    benches, refused = list[Bench](), dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        candidate = Path(folder) / out.name
        candidate.write_bytes(content)
        for provider in timing.providers:
            try:
                found = benchmark(
                    path,
                    candidate,
                    provider=provider,
                    batches=timing.batches,
                    threads=timing.threads,
                    runs=timing.runs,
                    seconds=timing.seconds,
                    input_shapes={name: tuple(x.shape) for name, x in one.items()},
                    progress=progress,
                )
            except BenchError as error:
                if provider == "cpu":
                    raise
                refused[provider] = first_line(error)
                continue
            new = found.new.model_copy(update={"path": str(out)})
            benches.append(found.model_copy(update={"new": new}))
    return benches, refused


def _times(one: Feeds, timing: Timing, models: Sequence[bytes]) -> list[float]:
    return race(models, one, timing.providers[0], timing.threads)


def _wins(benches: Sequence[Bench], refused: Mapping[str, str]) -> bool:
    """In the first runtime faster at the first batch size, and in none slower at any, nor another network."""
    verdicts = [timing.verdict for bench in benches for timing in bench.batches]
    if refused or not verdicts[0].startswith("faster"):
        return False
    return not any(each.startswith("slower") for each in verdicts)


def _why(benches: Sequence[Bench], refused: Mapping[str, str]) -> str:
    if not benches and not refused:
        return "no race was run"
    said = "; ".join(
        f"{_where(bench)}at batch {t.batch} 8 bit is {t.verdict}, {t.quoted.value:.2f} times as fast "
        f"({t.quoted.low:.2f} to {t.quoted.high:.2f}), {t.quoted_ms[1]:.3g} ms for {t.quoted_ms[0]:.3g} ms"
        for bench in benches
        for t in bench.batches
    )
    said = "; ".join([*([said] if said else []), *(f"in {p} not timed: {why}" for p, why in refused.items())])
    return said if _wins(benches, refused) else f"{said}: ship the float file"


def _where(bench: Bench) -> str:
    return "" if bench.provider == "cpu" else f"in {bench.provider} "
