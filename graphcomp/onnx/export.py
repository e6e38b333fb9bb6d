"""Export: a Program becomes one ONNX file, proven equal to it before a byte is written.

The path of an export: torch.export of the fx graph (every node tagged) → `torch.onnx` → clean-up → ONNX
checker → parity with ONNX Runtime on several batches and inputs → the bytes that were checked go to disk.

**Metadata.** Every ONNX node carries `graphcomp.module` (module path, or the fx node's name for a function),
`graphcomp.node` (the fx node's name: a module that is called twice has two) and `graphcomp.pass` (the pass
that made or last changed it). The tags travel in `node.meta["custom"]`, which torch.export and its
decompositions preserve. Names of weights would not do: the exporter merges equal initialisers, so a BatchNorm
can end up reading another one's bias. A Conv into which the exporter folded a BatchNorm comes tagged as the
BatchNorm and is traced back to its convolution. What the exporter itself writes (source paths of this
machine, dumps of fx nodes; 2.6 % of a ShuffleNet's file) is dropped.

**Clean-up** with onnx-graphsurgeon does what the exporter (`optimize=True`) and the runtime leave undone:

- `x[:, index]` comes as Transpose, GatherND, Transpose: one Gather (2.3x faster on 64x56x56, one thread);
- `x[:, :, ::2, ::2]` comes as one Slice an axis, as in option-A shortcuts: one Slice (1.25x);
- Identity, and Pad by nothing: dropped;
- channels that a pass pads or selects: in the form that is fastest on the provider (`onnx.selection`).

Tried and left out: dead nodes, unused and duplicate initialisers, chains of Reshape (the exporter leaves
none); scaling of a Conv's output by a constant (folded when the runtime loads the file); constant folding
(gains nothing on CNNs, and it would undo weights that are stored as coefficients on purpose).
"""

import ast
import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.onnx import ONNXProgram

from graphcomp.base import Progress, atomic_file, muted, quiet
from graphcomp.errors import BenchError, ExportError, ProviderError, first_line
from graphcomp.ir import PASS_KEY, Program, copy_graph, fresh_inputs, named_tensors, output_tensors
from graphcomp.onnx.lowering import dct_layers, densified, taking_weights
from graphcomp.onnx.selection import cheapest
from graphcomp.onnx.weights import Rebuilt, rebuild_weights
from graphcomp.records import DctWeights, Export
from graphcomp.runtime import Provider, open_session, run_errors

__all__ = ["MODULE_PROP", "NODE_PROP", "PASS_PROP", "Exports", "Stored", "export_onnx"]

MODULE_PROP = "graphcomp.module"
NODE_PROP = "graphcomp.node"
PASS_PROP = "graphcomp.pass"

Stored = Literal["coefficients", "dense"]
"""How a file stores weights that a program computes from DCT coefficients."""

_TAG = "graphcomp"
_BATCH = "batch"
# Protobuf's limit of 2^31 bytes, less room for the graph around the weights.
_MAX_BYTES = 2**31 - 2**24
# Networks of one run that are remembered, which the last export mostly asks for again.
_MAX_KEPT = 2**29
# Captured with fake tensors, so it costs nothing; unlike 1 or 2, no literal of a network equals it by chance.
_CAPTURE_BATCH = 7
# Scale and shift of the random inputs: plain normal, and values far outside of it.
_INPUT_KINDS = ((1.0, 0.0), (4.0, 1.0))
_UNBAKE = "use x.shape[0] or -1 in its views, or export with dynamic_batch=False and batches=(1,)"
_HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Operators whose ONNX form is merged into the heavy node before it, which then carries their tag.
_ABSORBED = re.compile(r"aten::(\w*batch_norm\w*|add|sub|mul|div)")
_MULTIPLIES = re.compile(r"aten::(conv\w*|linear|addmm|mm|bmm|baddbmm|matmul|mv|dot|einsum)")


@dataclass(frozen=True)
class _Case:
    """One comparison: the inputs, and what the program says to them."""

    batch: int
    inputs: tuple[Tensor, ...]
    expected: list[Tensor]


@dataclass(frozen=True)
class _Origin:
    """Where an ONNX node comes from, as it is written into the file."""

    module: str
    node: str
    made_by: str


@dataclass(frozen=True)
class _Translated:
    """What the exporter made of a network, and the fx node that each of its nodes comes from, by name."""

    content: bytes
    tags: Mapping[str, str]

    def model(self) -> ModelProto:
        return onnx.load_model_from_string(self.content)

    def origins(self, program: Program) -> dict[str, _Origin | None]:
        """For a program of the same graph, whose passes may have other names."""
        nodes = {node.name: node for node in program.graph.nodes}
        return {name: _origin(nodes[tag]) for name, tag in self.tags.items()}


@dataclass(frozen=True, eq=False)
class Exports:
    """What one run exported: the exporter's work is not done twice for one network, nor are forms of channel
    selections timed twice, which could end differently.

    Attributes:
        times: see `onnx.selection.cheapest`.
    """

    times: dict[str, dict[str, float]] = field(default_factory=dict)
    _kept: dict[str, _Translated] = field(default_factory=dict, repr=False)

    def key(self, source: Program, *options: Any) -> str:
        """Of everything that decides what the exporter makes."""
        shapes = [f"{x.dtype} {tuple(x.shape)}" for x in source.example_inputs]
        return json.dumps([source.fingerprint(), shapes, *options])

    def find(self, key: str) -> _Translated | None:
        """What was added under `key`, if it is still there."""
        return self._kept.get(key)

    def add(self, key: str, translated: _Translated) -> None:
        """Keep it; the oldest go where all together are larger than `_MAX_KEPT`."""
        self._kept[key] = translated
        while len(self._kept) > 1 and sum(len(t.content) for t in self._kept.values()) > _MAX_KEPT:
            del self._kept[next(iter(self._kept))]


def export_onnx(
    program: Program,
    path: str | Path,
    *,
    opset: int = 18,
    batches: Sequence[int] = (1, 2, 5),
    seed: int = 0,
    tolerance: float = 1e-4,
    dynamic_batch: bool = True,
    cleanup: bool = True,
    provider: Provider | None = None,
    dct: Stored = "coefficients",
    known: Exports | None = None,
    progress: Progress = quiet,
) -> Export:
    """Write `program` to the ONNX file `path`, after checking that ONNX Runtime computes the same from it.

    One input is called `input`, several have the names of forward's arguments. One output is called `output`;
    those in tuples get `_0`, `_1`, …, those in dicts their keys.

    Args:
        program: left as it is; what it computes in eval mode is written.
        path: replaced if it exists; its parents are made.
        opset: version of the default ONNX operator set; 18 is what the exporter writes, others are converted.
        batches: batch sizes to compare at. With `dynamic_batch=False` the file takes only the first of them.
        seed: of the random inputs, two at every batch size.
        tolerance: largest |onnx - torch| / max |torch| of any output.
        dynamic_batch: whether the first dimension of every input is left open.
        cleanup: whether to rewrite what the exporter leaves behind (see the module's documentation).
        provider: where the file will run: forms of channel selections are timed there. None times nothing.
        dct: how weights are stored that the program computes from DCT coefficients (nothing else is touched):
            as these coefficients, from which the runtime rebuilds them once when it loads the file, or dense:
            a larger file for any runtime. Both run at the same speed.
        known: what the same run exported before, read and extended; None: nothing.
        progress: told which of the steps is due: on a busy machine an export takes a minute.

    Returns:
        Size, opset, node count, error by batch size, what the clean-up did, and how DCT weights are stored.

    Raises:
        ExportError: naming the node, output or batch, if the program cannot be exported, bakes in its batch
            size, does not fit one file, or if the file is invalid or computes something else.
        OutputError: if the file cannot be written. Nothing is left behind and an old file stays.
        ProviderError: if ONNX Runtime itself does not work here.
    """
    path = Path(path)
    _check_request(batches)
    program = program.in_eval_mode()
    layers = dct_layers(program)
    source = densified(program) if layers and dct == "dense" else program
    _check_size(source)
    checked = tuple(batches) if dynamic_batch else (batches[0],)
    inputs, outputs = _input_names(program), _output_names(program)
    progress("run the network", 0.0)
    cases = [case for batch in checked for case in _cases(program, batch, seed, outputs)]
    known = Exports() if known is None else known
    key = known.key(source, inputs, outputs, opset, None if dynamic_batch else batches[0])
    translated = known.find(key)
    if translated is None:
        given = taking_weights(source) if dct_layers(source) else (source.module, {})
        progress("capture the graph", 0.1)
        exported = _capture(source, None if dynamic_batch else batches[0], *given)
        progress("translate it to ONNX", 0.3)
        names = [*inputs, *given[1]]
        translated = _translate(program, exported, opset, names, outputs, dynamic_batch)
        known.add(key, translated)
    model, origins = translated.model(), translated.origins(program)
    progress("clean up", 0.7)
    done: list[str] = []
    if cleanup:
        with muted():
            model, done = _clean(model)
    ours = {name for name, origin in origins.items() if origin is not None and origin.made_by != "trace"}
    rebuilt = rebuild_weights(model, dct_layers(source))
    origins |= _origins_of_weights(program, rebuilt)
    if cleanup and provider is not None:
        feeds = {name: x.numpy() for name, x in zip(inputs, cases[0].inputs, strict=True)}
        progress("choose the form of channel selections", 0.75)
        model, said = _select_cheaply(model, ours, feeds, provider, known.times)
        done += said
    _annotate(model, origins)
    content = model.SerializeToString()
    _check_model(content, path)
    progress(f"compare with the network at batch {', '.join(map(str, checked))}", 0.9)
    parity = _parity(content, cases, inputs, outputs, tolerance, rebuilt.nodes)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    return Export(
        path=str(path),
        bytes=len(content),
        opset=opset,
        nodes=len(model.graph.node),
        parity=parity,
        cleanup=done,
        dct=DctWeights(
            stored=dct,
            layers=len(layers),
            coefficient_bytes=rebuilt.stored.coefficients,
            order_bytes=rebuilt.stored.order,
        )
        if layers
        else None,
    )


def _check_request(batches: Sequence[int]) -> None:
    if not batches or min(batches) < 1:
        raise ExportError(f"batches: found {list(batches)}, expected at least one size, each at least 1")


def _check_size(program: Program) -> None:
    tensors = {id(t): t for t in named_tensors(program.module).values()}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    if size > _MAX_BYTES:
        raise ExportError(
            f"weights: found {size / 2**30:.2f} GiB, expected at most {_MAX_BYTES / 2**30:.2f} GiB, all "
            "that one ONNX file can hold; compress more or export in parts"
        )


def _input_names(program: Program) -> list[str]:
    names = [cast(str, n.target) for n in program.graph.nodes if n.op == "placeholder"]
    return ["input"] if len(program.example_inputs) == 1 else names[: len(program.example_inputs)]


def _output_names(program: Program) -> list[str]:
    """One name for every tensor of the output, in the order of `output_tensors`."""
    result = program.values[next(iter(reversed(program.graph.nodes)))]
    taken, names = set(_input_names(program)), list[str]()
    for name in _names_in(result, ""):
        while name in taken:
            name += "_output"
        taken.add(name)
        names.append(name)
    if not names:
        raise ExportError(
            f"output: found {type(result).__name__} without a tensor, expected at least one tensor"
        )
    return names


def _names_in(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, Tensor):
        yield prefix or "output"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _names_in(item, f"{prefix}_{key}" if prefix else str(key))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _names_in(item, f"{prefix or 'output'}_{index}")
    elif value is not None:
        raise ExportError(
            f"{prefix or 'output'}: found {type(value).__name__}, expected tensors, or tuples, lists and "
            "dicts of them; return only tensors from forward"
        )


def _cases(program: Program, batch: int, seed: int, names: Sequence[str]) -> Iterator[_Case]:
    """What the program answers to every kind of input at one batch size."""
    for index, (scale, shift) in enumerate(_INPUT_KINDS):
        inputs = tuple(
            (x * scale + shift).to(example.dtype) if example.is_floating_point() else x
            for x, example in zip(
                fresh_inputs(program, batch, seed + index), program.example_inputs, strict=True
            )
        )
        expected = _run(program, inputs, batch)
        for name, tensor in zip(names, expected, strict=True):
            if not tensor.isfinite().all():
                raise ExportError(
                    f"output {name!r}: found NaN or infinity from the program itself at batch {batch}, "
                    "expected finite numbers to compare with; check its weights"
                )
        yield _Case(batch, inputs, expected)


def _run(program: Program, inputs: tuple[Tensor, ...], batch: int) -> list[Tensor]:
    try:
        with torch.inference_mode():
            # Clones, because a network may work on its input in place.
            output = fx.Interpreter(program.module).run(*(x.clone() for x in inputs))
        return [tensor.detach() for tensor in output_tensors(output)]
    # Whatever a network's operators raise; the message says what and where.
    except Exception as error:
        advice = "check its inputs" if batch == 1 else f"a batch size may be baked into the graph; {_UNBAKE}"
        raise ExportError(
            f"{_place(error, program)}: found '{first_line(error)}', expected a network that runs at batch "
            f"{batch}; {advice}"
        ) from error


def _capture(
    program: Program,
    batch: int | None,
    network: fx.GraphModule | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> ExportedProgram:
    """torch.export of the program with every node tagged by its fx name; `batch` None leaves it open.

    `network` may stand for the program's own module and take `weights` as further inputs.
    """
    inputs = fresh_inputs(program, batch or _CAPTURE_BATCH, 0)
    inputs = tuple(x.to(example.dtype) for x, example in zip(inputs, program.example_inputs, strict=True))
    open_batch = Dim(_BATCH)
    given = tuple((weights or {}).values())
    shapes = None if batch else (*({0: open_batch} for _ in inputs), *(None for _ in given))
    with muted():
        try:
            tagged = _tagged(network or program.module)
            return torch.export.export(tagged, (*inputs, *given), dynamic_shapes=shapes, strict=False)
        # torch.export passes on whatever its many layers raise; there is no common base.
        except Exception as error:
            raise _capture_error(program, error) from error


def _tagged(network: fx.GraphModule) -> fx.GraphModule:
    """The same modules under a copy of the graph whose nodes carry their names through torch.export."""
    graph = copy_graph(network.graph)
    for node in graph.nodes:
        node.meta = {"custom": {_TAG: node.name}}
    return fx.GraphModule(network, graph)


def _capture_error(program: Program, error: Exception) -> ExportError:
    place = _place(error, program)
    if re.search(r"[Cc]onstraints violated|specialized it to be a constant", str(error)):
        return ExportError(
            f"{place}: found a batch size baked into the graph ({first_line(error)}), expected any batch "
            f"size; {_UNBAKE}"
        )
    return ExportError(
        f"{place}: torch.export found '{first_line(error)}', expected a graph that it can follow; replace "
        "this operation, or try dynamic_batch=False"
    )


def _translate(
    program: Program,
    exported: ExportedProgram,
    opset: int,
    inputs: list[str],
    outputs: list[str],
    dynamic_batch: bool,
) -> _Translated:
    """The ONNX model, with unique names, and the fx node of each of its nodes by name."""
    with muted() as noise:
        try:
            result = torch.onnx.export(
                exported,
                dynamo=True,
                # Only names the open dimension: `exported` has the shapes already.
                dynamic_shapes=_open_batches(program, inputs) if dynamic_batch else None,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                external_data=False,
                verbose=False,
            )
        # Conversion runs one Python function an operator, which may raise anything.
        except Exception as error:
            cause = error.__cause__.__cause__ if error.__cause__ else None
            raise ExportError(
                f"{_place(error, program, _tags(exported))}: the ONNX exporter found "
                f"'{first_line(cause or error.__cause__ or error)}', expected operators that ONNX has; "
                "replace this operation"
            ) from error
        result = cast(ONNXProgram, result)
        tags = _node_tags(result)
        model = result.model_proto
    _check_translation(model, opset, outputs, noise.getvalue())
    return _Translated(model.SerializeToString(), tags)


def _open_batches(program: Program, inputs: Sequence[str]) -> tuple[dict[int, str] | None, ...]:
    """The open dimension of every input; weights, which stand behind the program's own, have none."""
    own = len(program.example_inputs)
    return tuple({0: _BATCH} if index < own else None for index in range(len(inputs)))


def _check_translation(model: ModelProto, opset: int, outputs: list[str], noise: str) -> None:
    # The exporter writes another version than it was asked for without raising.
    found = next(o.version for o in model.opset_import if not o.domain)
    if found != opset:
        said = f" (the exporter said: {noise.strip().splitlines()[-1].strip()})" if noise.strip() else ""
        raise ExportError(
            f"opset: found {found} in the exported model, expected {opset}{said}; ask for {found}"
        )
    names = [o.name for o in model.graph.output]
    if names != outputs:
        raise ExportError(
            f"outputs: found {names} in the exported model, expected {outputs}; the network must not change "
            "its inputs or buffers in place"
        )


def _node_tags(result: ONNXProgram) -> dict[str, str]:
    """The fx node of every node by name; makes names of nodes and values unique on the way.

    A node that came without a tag belongs to its nearest neighbour that has one, readers first.
    """
    # The exporter names outputs without looking whether a value inside has that name already.
    ir_passes.NameFixPass()(result.model)
    aten = {n.name: n for n in cast(ExportedProgram, result.exported_program).graph.nodes}
    nodes: list[ir.Node] = list(result.model.graph)
    tags = {node: tag for node in nodes if (tag := _tag(node, aten)) is not None}
    for node in reversed(nodes):
        _inherit(node, node.successors(), tags)
    for node in nodes:
        _inherit(node, node.predecessors(), tags)
    return {cast(str, node.name): tags.get(node, "output") for node in nodes}


def _origin(node: fx.Node) -> _Origin:
    module = cast(str, node.target) if node.op == "call_module" else node.name
    return _Origin(module, node.name, str(node.meta.get(PASS_KEY, "trace")))


def _inherit(node: ir.Node, neighbours: Sequence[ir.Node], tags: dict[ir.Node, str]) -> None:
    near = next((tags[n] for n in neighbours if n in tags), None)
    if near is not None:
        tags.setdefault(node, near)


def _tag(node: ir.Node, aten: Mapping[str, fx.Node]) -> str | None:
    """The name of the fx node that an ONNX node was made for; None if the exporter does not say."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    names = [ast.literal_eval(scopes)[-1]] if scopes else []
    # Rewritten nodes lose their metadata, but their outputs keep the name, Split's with a suffix.
    names += [re.sub(r"_split_\d+$", "", value.name) for value in node.outputs if value.name]
    source = next((aten[name] for name in names if name in aten), None)
    if source is None:
        return None
    if node.op_type in _HEAVY and _ABSORBED.fullmatch(_operator(source)):
        source = _multiplication_before(source) or source
    return _tag_of(source)


def _tag_of(node: fx.Node) -> str | None:
    return cast("str | None", node.meta.get("custom", {}).get(_TAG))


def _operator(node: fx.Node) -> str:
    return str(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else ""


def _multiplication_before(node: fx.Node) -> fx.Node | None:
    """The nearest convolution, linear layer or matrix product that `node` depends on."""
    level = dict.fromkeys(node.all_input_nodes)
    while level:
        for candidate in level:
            if _MULTIPLIES.fullmatch(_operator(candidate)):
                return candidate
        level = dict.fromkeys(source for n in level for source in n.all_input_nodes)
    return None


def _tags(exported: ExportedProgram) -> dict[str, str]:
    """Operator name → fx name, before and after decomposition, for error messages."""
    nodes = list(exported.graph.nodes)
    # May fail for the reason that the export did; then the message has the operator's own name.
    with contextlib.suppress(Exception):
        nodes += exported.run_decompositions().graph.nodes
    return {node.name: tag for node in nodes if (tag := _tag_of(node)) is not None}


def _clean(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """The rewritten model (without any metadata), and one line for each rule that found something."""
    graph, done = gs.import_onnx(model), list[str]()
    for text, rule in _RULES.items():
        before = len(graph.nodes)
        count = sum(rule(node, graph) for node in list(graph.nodes))
        graph.cleanup()
        if count:
            done.append(f"{text}: {count} rewritten, {before} -> {len(graph.nodes)} nodes")
    if not done:
        return model, done
    graph.toposort()
    return gs.export_onnx(graph), done


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


def _index_is_gather(node: Any, graph: Any) -> bool:
    """Transpose by p, GatherND on the first axis, Transpose back: Gather on axis p[0]."""
    gather = _producer(node, "GatherND") if node.op == "Transpose" else None
    first = _producer(gather, "Transpose") if gather else None
    if gather is None or first is None or gather.attrs.get("batch_dims", 0):
        return False
    index, order = gather.inputs[1], [int(axis) for axis in first.attrs["perm"]]
    if not isinstance(index, gs.Constant) or len(index.shape) != 2 or index.shape[1] != 1:
        return False
    if [order[axis] for axis in node.attrs["perm"]] != sorted(order):
        return False
    node.op, node.attrs = "Gather", {"axis": order[0]}
    node.inputs = [first.inputs[0], gs.Constant(f"{node.name}/index", index.values[:, 0].astype(np.int64))]
    return True


def _slices_are_one(node: Any, graph: Any) -> bool:
    """A Slice that only another Slice reads, on other axes: one Slice on all of them."""
    before = _producer(node, "Slice") if node.op == "Slice" else None
    if before is None or not _is_only_reader(node, before, graph):
        return False
    ranges, ranges_before = _slice_ranges(node), _slice_ranges(before)
    if ranges is None or ranges_before is None:
        return False
    joined: NDArray[np.int64] = np.concatenate([ranges_before, ranges], axis=1)
    # A negative axis cannot be compared with one that counts from the front.
    if joined[2].min() < 0 or len(set(joined[2].tolist())) != joined.shape[1]:
        return False
    parts = zip(("starts", "ends", "axes", "steps"), joined, strict=True)
    node.inputs = [before.inputs[0], *(gs.Constant(f"{node.name}/{name}", row.copy()) for name, row in parts)]
    return True


def _slice_ranges(node: Any) -> NDArray[np.int64] | None:
    """Rows starts, ends, axes, steps with a column an axis; None if they are not all constants."""
    parts = list(node.inputs[1:])
    if len(parts) not in (3, 4) or not all(isinstance(p, gs.Constant) for p in parts):
        return None
    rows = [p.values.astype(np.int64) for p in parts]
    return np.stack([*rows, *([np.ones_like(rows[0])] if len(rows) == 3 else [])])


def _does_nothing(node: Any, graph: Any) -> bool:
    """An Identity, or a Pad by zero on every side: its readers read its input."""
    if node.op not in ("Identity", "Pad") or any(node.outputs[0] is o for o in graph.outputs):
        return False
    if node.op == "Pad" and not (isinstance(node.inputs[1], gs.Constant) and not node.inputs[1].values.any()):
        return False
    source, result = node.inputs[0], node.outputs[0]
    for reader in list(result.outputs):
        reader.inputs = [source if tensor is result else tensor for tensor in reader.inputs]
    return True


def _producer(node: Any, op: str) -> Any | None:
    """The node that makes the first input of `node`, if it is an `op`."""
    return next((producer for producer in node.inputs[0].inputs if producer.op == op), None)


def _is_only_reader(node: Any, before: Any, graph: Any) -> bool:
    value = before.outputs[0]
    return all(reader is node for reader in value.outputs) and not any(value is o for o in graph.outputs)


_RULES: dict[str, Callable[[Any, Any], bool]] = {
    "indexing by Transpose, GatherND, Transpose -> Gather": _index_is_gather,
    "Slice of a Slice -> one Slice": _slices_are_one,
    "Identity or Pad by nothing -> dropped": _does_nothing,
}


def _origins_of_weights(program: Program, rebuilt: Rebuilt) -> dict[str, _Origin | None]:
    """The layer for the node that yields its weight; None for those before it, which several layers share."""
    readers = {n.target: n for n in reversed(program.graph.nodes) if n.op == "call_module"}
    inner: dict[str, _Origin | None] = dict.fromkeys(rebuilt.nodes)
    return inner | {name: _origin(readers[target]) for target, name in rebuilt.last.items()}


def _annotate(model: ModelProto, origins: Mapping[str, _Origin | None]) -> None:
    """Replace all metadata and documentation strings of the model by the origins of its nodes."""
    graph = model.graph
    for item in (graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for node in graph.node:
        origin = origins[node.name]
        if origin is None:
            continue
        for key, value in (
            (MODULE_PROP, origin.module),
            (NODE_PROP, origin.node),
            (PASS_PROP, origin.made_by),
        ):
            node.metadata_props.add(key=key, value=value)


def _check_model(content: bytes, path: Path) -> None:
    try:
        onnx.checker.check_model(content, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{path.name}: the ONNX checker found '{first_line(error)}', expected a valid model; nothing "
            "was written; try cleanup=False or another opset"
        ) from error


def _parity(
    content: bytes,
    cases: Sequence[_Case],
    inputs: Sequence[str],
    outputs: Sequence[str],
    tolerance: float,
    constant: Sequence[str] = (),
) -> dict[str, float]:
    """Worst relative error at every batch size.

    ExportError if one is above `tolerance`, or if one of the nodes named in `constant` is left to every run.
    """
    try:
        session = open_session(content, "cpu", torch.get_num_threads()).session
    except ProviderError:
        raise
    except BenchError as error:
        raise ExportError(
            f"export: {error}, expected a file that runs; try cleanup=False or another opset"
        ) from error
    _check_folded(session, constant)
    worst: dict[str, float] = {}
    for case in cases:
        feed = {name: x.numpy() for name, x in zip(inputs, case.inputs, strict=True)}
        try:
            results = session.run(list(outputs), feed)
        except run_errors() as error:
            raise ExportError(
                f"batch {case.batch}: ONNX Runtime found '{first_line(error)}', expected a file that runs; "
                f"the batch size may be baked into the graph; {_UNBAKE}"
            ) from error
        for name, found, expected in zip(outputs, results, case.expected, strict=True):
            error_here = _checked_error(name, case.batch, found, expected.numpy(), tolerance)
            worst[str(case.batch)] = max(worst.get(str(case.batch), 0.0), error_here)
    return worst


def _check_folded(session: Any, constant: Sequence[str]) -> None:
    parts = session.get_provider_graph_assignment_info()
    left = {node.name for part in parts for node in part.get_nodes()} & set(constant)
    if left:
        raise ExportError(
            f"{min(left)}: found it among the nodes that ONNX Runtime computes at every run ({len(left)} in "
            "all), expected weights that are rebuilt once when the file is loaded; nothing was written; use "
            "dct='dense'"
        )


def _checked_error(
    name: str, batch: int, found: NDArray[Any], expected: NDArray[Any], tolerance: float
) -> float:
    place = f"output {name!r} at batch {batch}"
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ExportError(
            f"{place}: found {found.dtype} {found.shape}, expected {expected.dtype} {expected.shape}; the "
            f"batch size may be baked into the graph; {_UNBAKE}"
        )
    error = _relative_error(found, expected)
    # Not `error > tolerance`: NaN must fail.
    if not error <= tolerance:
        raise ExportError(
            f"{place}: found a relative error of {error:.3g} of ONNX Runtime against torch, expected at most "
            f"{tolerance:g}; nothing was written; try cleanup=False or another opset, or raise the tolerance"
        )
    return error


def _relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """max |found - expected| / max |expected|; absolute where all expected values are zero."""
    if not expected.size:
        return 0.0
    peak = float(np.abs(expected.astype(np.float64)).max())
    error = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())
    return error / peak if peak else error


def _place(error: BaseException, program: Program, tags: Mapping[str, str] | None = None) -> str:
    """The module or node that an error speaks of; "export" if it names none."""
    match = re.search(r"(?:While executing|translating node) %(\w+)", str(error))
    if match is None:
        return "export"
    name = (tags or {}).get(match[1], match[1])
    node = next((n for n in program.graph.nodes if n.name == name), None)
    return f"{_origin(node).module} ({match[1]})" if node is not None and node.op == "call_module" else name
