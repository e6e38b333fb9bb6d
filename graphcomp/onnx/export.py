"""Export: a Program becomes one ONNX file, proven equal to it before a byte is written.

The path of an export: torch.export of the fx graph (every node tagged) → `torch.onnx` → clean-up → ONNX
checker → parity with ONNX Runtime on several batches and inputs → the bytes that were checked go to disk.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from graphcomp.base import Progress, muted, quiet
from graphcomp.errors import ExportError, ProviderError, first_line
from graphcomp.ir import Program, named_tensors
from graphcomp.onnx import storage
from graphcomp.onnx.agreement import TOLERANCES, tolerance_for
from graphcomp.onnx.alone import apart
from graphcomp.onnx.cleanup import clean
from graphcomp.onnx.drafts import Draft, draft
from graphcomp.onnx.half import store_half
from graphcomp.onnx.interface import describe, input_names, output_names
from graphcomp.onnx.lowering import dct_layers, densified, taking_weights
from graphcomp.onnx.origins import annotate, origins_of_weights
from graphcomp.onnx.parity import Case, compare, make_cases, unexplained
from graphcomp.onnx.rounding import Allowance, Samples, allowance
from graphcomp.onnx.selection import cheapest
from graphcomp.onnx.sizes import Dynamic, is_open, odd_sizes, open_axes, other_sizes
from graphcomp.onnx.storage import is_too_large, tried, written
from graphcomp.onnx.translate import Translated, capture, translate
from graphcomp.onnx.weights import rebuild_weights
from graphcomp.onnx.writing import OPSET
from graphcomp.records import DctWeights, Export
from graphcomp.runtime import Provider

Stored = Literal["coefficients", "dense"]
"""How a file stores weights that a program computes from DCT coefficients."""
Weights = Literal["fp32", "fp16"]
"""What weights are stored as; the arithmetic is the program's."""
# Networks of one run that are remembered, which the last export mostly asks for again.
_MAX_KEPT = 2**29


@dataclass(frozen=True, eq=False)
class Exports:
    """What one run exported: the exporter's work is not done twice for one network, nor are forms of channel
    selections timed twice, which could end differently.

    Attributes:
        times: see `onnx.selection.cheapest`.
    """

    times: dict[str, dict[str, float]] = field(default_factory=dict)
    _kept: dict[str, Translated] = field(default_factory=dict, repr=False)

    def key(self, source: Program, *options: Any) -> str:
        """Of everything that decides what the exporter makes."""
        shapes = [f"{x.dtype} {tuple(x.shape)}" for x in source.example_inputs]
        return json.dumps([source.fingerprint(), shapes, *options])

    def find(self, key: str) -> Translated | None:
        """What was added under `key`, if it is still there."""
        return self._kept.get(key)

    def add(self, key: str, translated: Translated) -> None:
        """Keep it; the oldest go where all together are larger than `_MAX_KEPT`."""
        self._kept[key] = translated
        while len(self._kept) > 1 and sum(len(t.content) for t in self._kept.values()) > _MAX_KEPT:
            del self._kept[next(iter(self._kept))]


def export_onnx(
    program: Program,
    path: str | Path,
    *,
    opset: int | None = None,
    batches: Sequence[int] = (1, 2, 5),
    seed: int = 0,
    tolerance: float | None = None,
    dynamic: Sequence[Dynamic] | None = None,
    cleanup: bool = True,
    provider: Provider | None = None,
    dct: Stored = "coefficients",
    weights: Weights = "fp32",
    known: Exports | None = None,
    progress: Progress = quiet,
) -> Export:
    """Write `program` to the ONNX file `path`, after checking that ONNX Runtime computes the same from it.

    Names, metadata, doc strings and open axes are those of the program's interface; without one, one input is
    called `input`, several have the names of forward's arguments, one output is called `output`, those in
    tuples get `_0`, `_1`, …, those in dicts their keys. Its history is written with it.

    Args:
        program: left as it is; what it computes in eval mode is written.
        path: replaced if it exists; its parents are made. What protobuf cannot hold goes into a file of
            numbers beside it (see `onnx.storage`).
        opset: version of the default ONNX operator set, at least 18; None: that of the file that the program
            was read from, if it is 18 or more, else 18.
        batches: batch sizes to compare at. Where the batch is not open the file takes only the first.
        seed: of the random inputs, two at every batch size.
        tolerance: largest |onnx - torch| / max |torch| of any output, where the difference is above 1e-6;
            None: 1e-4, or what the program's type allows (see `onnx.agreement`), and more where the network
            amplifies rounding (see `onnx.rounding`), which the record says.
        dynamic: which of batch, height and width are left open (see `onnx.sizes`), and compared at two other
            sizes; None: what the file did that the program was read from, else the batch.
        cleanup: whether to rewrite what the exporter leaves behind (see `onnx.cleanup`).
        provider: where the file will run: forms of channel selections are timed there. None times nothing.
        dct: how weights are stored that the program computes from DCT coefficients (nothing else is touched):
            as these coefficients, from which the runtime rebuilds them once when it loads the file, or dense:
            a larger file for any runtime. Both run at the same speed.
        weights: fp16 stores them as float16, which the runtime casts back once when it loads the file: half
            the bytes at the same speed. The file is compared as it is with `fp32`, and then once more, with
            the tolerance of float16.
        known: what the same run exported before, read and extended; None: nothing.
        progress: told which of the steps is due: on a busy machine an export takes a minute.

    Returns:
        Size, opset, node count, error by batch size, what the clean-up did, and how DCT weights are stored.

    Raises:
        ExportError: naming the node, output or batch, if the program cannot be exported, bakes in its batch
            size, is too large for torch's exporter where that is needed, or if the file is invalid or
            computes something else.
        OutputError: if the file cannot be written. Nothing is left behind and an old file stays.
        ProviderError: if ONNX Runtime itself does not work here.
    """
    path = Path(path)
    _check_request(batches)
    program = program.in_eval_mode()
    layers = dct_layers(program)
    source = densified(program) if layers and dct == "dense" else program
    opset = opset or max(program.interface.opset or 0, OPSET)
    axes = open_axes(program, dynamic)
    checked = tuple(batches) if is_open(axes, batch=True) else (batches[0],)
    inputs, outputs = input_names(program), output_names(program)
    asked, loose = tolerance, tolerance or TOLERANCES["float16"]
    tolerance = tolerance or tolerance_for(program.tensors.values())
    progress("run the network", 0.0)
    sizes, odd = other_sizes(program, axes), odd_sizes(program, axes)
    if dynamic is None:  # the file's own word, which was read at the first of them: it may not mean all
        sizes, odd = sizes[:1], [*sizes[1:], *odd]
    cases = make_cases(program, checked, seed, outputs, sizes, odd)
    known = Exports() if known is None else known

    def exporter() -> Translated:
        key = known.key(source, inputs, outputs, opset, axes, checked[0])
        translated = known.find(key)
        if translated is None:
            _check_size(source)
            given = taking_weights(source) if dct_layers(source) else (source.module, {})
            progress("capture the graph", 0.1)
            exported = capture(source, axes, checked[0], *given)
            progress("translate it to ONNX", 0.3)
            names = [*inputs, *given[1]]
            translated = translate(program, exported, opset, names, outputs, axes)
            known.add(key, translated)
        return translated

    progress("write it as ONNX", 0.1)
    drafted = draft(source, inputs, outputs, opset, axes, checked[0], exporter)
    model, origins = drafted.model, drafted.origins(program)
    progress("clean up", 0.7)
    done: list[str] = []
    if cleanup and drafted.fallback is not None:
        with muted():
            model, done = clean(model)
    ours = {name for name, origin in origins.items() if origin is not None and origin.made_by != "trace"}
    rebuilt = rebuild_weights(model, dct_layers(source))
    origins |= origins_of_weights(program, rebuilt)
    if cleanup and provider is not None and is_too_large(model):
        done.append("channel selections left as exported: what is timed has to be one file")
    elif cleanup and provider is not None:
        feeds = {name: x.numpy() for name, x in zip(inputs, cases[0].inputs, strict=True)}
        progress("choose the form of channel selections", 0.75)
        model, said = _select_cheaply(model, ours, feeds, provider, known.times)
        done += said
    annotate(model, origins)
    describe(model, program)
    progress(f"compare with the network at batch {', '.join(map(str, checked))}", 0.9)
    rounding = partial(_rounding, program, drafted, model, inputs, tolerance)
    explained = unexplained if asked is not None or is_too_large(model) else rounding

    def judge(file: bytes | Path, most: float) -> tuple[dict[str, float], list[str]]:
        _check_model(file, path)
        return compare(file, cases, inputs, outputs, most, rebuilt.nodes, explained)

    half, remarks = None, list[str]()
    if weights == "fp16":
        with tried(model) as file:
            _, remarks = judge(file, tolerance)
        half, tolerance, explained = store_half(model), max(loose, tolerance), unexplained
    with written(model, path) as placed:
        parity, said = judge(placed.file, tolerance)
    remarks += said
    return Export(
        path=str(path),
        data=placed.data,
        bytes=placed.bytes,
        opset=opset,
        nodes=len(model.graph.node),
        parity=parity,
        remarks=remarks,
        cleanup=done,
        fallback=drafted.fallback,
        dct=DctWeights(
            stored=dct,
            layers=len(layers),
            coefficient_bytes=rebuilt.stored.coefficients,
            order_bytes=rebuilt.stored.order,
        )
        if layers
        else None,
        half=half,
    )


def _rounding(
    program: Program, drafted: Draft, model: ModelProto, inputs: Sequence[str], tolerance: float, case: Case
) -> Allowance:
    """What rounding explains; nothing in files of torch's exporter, whose values have other names."""
    made = {name for node in model.graph.node for name in node.output}
    nodes = {n: drafted.values.get(n.name, "") for n in program.graph.nodes}
    nodes = {n: name for n, name in nodes.items() if name in made}
    if not nodes:
        return Allowance()

    def differs(samples: Samples, most: float) -> str | None:
        feed = {name: x.numpy() for name, x in zip(inputs, samples, strict=True)}
        return apart(program, nodes, model, feed, samples, most)

    return allowance(program, [case.inputs], tolerance, differs)


def _check_request(batches: Sequence[int]) -> None:
    if not batches or min(batches) < 1:
        raise ExportError(f"batches: found {list(batches)}, expected at least one size, each at least 1")


def _check_size(program: Program) -> None:
    tensors = {id(t): t for t in named_tensors(program.module).values()}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    if size > storage.MOST_BYTES:
        raise ExportError(
            f"weights: found {size / 2**30:.2f} GiB and a call that only torch's exporter writes, or an "
            f"opset other than {OPSET}, expected at most {storage.MOST_BYTES / 2**30:.2f} GiB there; "
            "compress more, or leave opset out"
        )


def _select_cheaply(
    model: ModelProto,
    names: set[str],
    feeds: Mapping[str, NDArray[Any]],
    provider: Provider,
    known: dict[str, dict[str, float]],
) -> tuple[ModelProto, list[str]]:
    """`selection.cheapest`, or the model as it is where the provider does not work."""
    try:
        return cheapest(model, names, feeds, provider, known=known)
    except ProviderError as error:
        return model, [f"channel selections left as exported, for want of {provider}: {first_line(error)}"]


def _check_model(file: bytes | Path, path: Path) -> None:
    try:
        onnx.checker.check_model(file if isinstance(file, bytes) else str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{path.name}: the ONNX checker found '{first_line(error)}', expected a valid model; nothing "
            "was written; try cleanup=False or another opset"
        ) from error
