"""What an ONNX file says of itself without being run: its inputs, its hash, its multiply-accumulates.

MACs are those of convolutions, products of matrices, recurrent layers and attention that depend on an input;
what is computed from constants alone is folded when the file is loaded and costs nothing at run time. Nothing
is counted for bias, normalisation, activation or pooling. A node that multiplies but has no rule here is an
error, never a zero. Shapes come from ONNX's inference; where it finds none the file is run once to see them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from graphcomp.base import sha256
from graphcomp.errors import BenchError, LoadError
from graphcomp.ir import Shape
from graphcomp.runtime import external
from graphcomp.runtime.constants import SMALL, bound_constants, fold_small_constants
from graphcomp.runtime.seen import seen_shapes

__all__ = ["Input", "NodeWork", "OnnxFile", "count_macs", "feed_shapes", "node_work", "onnx_macs", "read"]

UNCOUNTED = frozenset(
    {"DeformConv", "QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "If", "Loop", "Scan"}
)

_BY_DATA = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression"})
"""What yields more or less from input to input: no run shows the shapes behind it."""


@dataclass(frozen=True)
class Input:
    """One input: `dtype` is ONNX's name (FLOAT), None in `shape` is a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        sizes = "x".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name} {self.dtype} {sizes or 'scalar'}"


@dataclass(frozen=True)
class OnnxFile:
    """A file that was read: `sha256` and `bytes` include external data files, in the order of their names."""

    path: Path
    model: ModelProto
    inputs: tuple[Input, ...]
    sha256: str
    bytes: int


@dataclass(frozen=True)
class NodeWork:
    """What one node that depends on an input does in one run.

    `elements` counts those of the tensors that it reads and writes, constants left out, as far as inference
    finds their shapes.
    """

    node: NodeProto
    macs: int
    elements: int


def read(path: Path, sizes: Mapping[str, Shape] | None = None) -> OnnxFile:
    """Read an ONNX file.

    Args:
        path: of the file.
        sizes: shapes by input, the batch with them (which is ignored), for dimensions that the file leaves
            open; "" is the only input.

    Raises:
        BenchError: if it is missing, unreadable or not an ONNX model, or if `sizes` are not its inputs'.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BenchError(
            f"{path}: cannot be read ({error.strerror}), expected an ONNX file; check the path"
        ) from error
    model = _parse(content, path)
    if not model.graph.node:
        raise BenchError(f"{path}: found no graph in {len(content)} bytes, expected an ONNX model")
    extra = _external_files(path, model)
    inputs = _sized(_inputs(model, str(path)), sizes or {}, str(path))
    return OnnxFile(path, model, inputs, sha256([content, *extra]), len(content) + sum(map(len, extra)))


def _parse(content: bytes, path: Path) -> ModelProto:
    try:
        return onnx.load_model_from_string(content)
    # protobuf's DecodeError has no base but Exception and no typed home of its own; nothing else is raised
    # here.
    except Exception as error:
        raise BenchError(
            f"{path}: found {len(content)} bytes that are not an ONNX model; export it again"
        ) from error


def feed_shapes(inputs: tuple[Input, ...], batch: int, place: str) -> dict[str, Shape]:
    """Shapes to feed for `batch` samples: a dynamic first dimension becomes `batch`.

    Raises BenchError for any other dynamic dimension, and for a batch that a fixed-batch file does not
    take.
    """
    fixed = _fixed_batch(inputs)
    if fixed is not None and fixed != batch:
        raise BenchError(
            f"{place}: found a fixed batch of {fixed}, expected {batch}; ask for batch {fixed} or export "
            "with a dynamic "
            "batch"
        )
    shapes: dict[str, Shape] = {}
    for item in inputs:
        sizes = [batch if dim == 0 and size is None else size for dim, size in enumerate(item.shape)]
        if None in sizes:
            raise BenchError(
                f"{place}: input {item} has a dynamic dimension {sizes.index(None)}, expected only the "
                f"batch to be; give --input-shape {item.name}=1,... with a size for every dimension"
            )
        shapes[item.name] = tuple(size for size in sizes if size is not None)
    return shapes


def onnx_macs(model_or_path: ModelProto | Path | str, batch: int = 1) -> int:
    """Multiply-accumulates of one run on `batch` samples, from ONNX shape inference.

    A file with a fixed batch is counted at that batch and scaled. Raises BenchError for a dynamic dimension
    other than the batch, a shape that inference does not find, or a node that multiplies and has no rule.
    """
    if isinstance(model_or_path, ModelProto):
        return _count(model_or_path, _inputs(model_or_path, "model"), batch, "model")
    return count_macs(read(Path(model_or_path)), batch)


def count_macs(file: OnnxFile, batch: int) -> int:
    """`onnx_macs` of a file that is already read."""
    return _count(file.model, file.inputs, batch, str(file.path))


def node_work(file: OnnxFile, batch: int) -> list[NodeWork]:
    """The work of every node that depends on an input, in the order of the file; errors as of `onnx_macs`."""
    return _work(file.model, file.inputs, batch, str(file.path))


def _count(model: ModelProto, inputs: tuple[Input, ...], batch: int, place: str) -> int:
    fixed = _fixed_batch(inputs)
    total = sum(work.macs for work in _work(model, inputs, fixed or batch, place))
    return total if fixed is None else total * batch // fixed


def _work(model: ModelProto, inputs: tuple[Input, ...], batch: int, place: str) -> list[NodeWork]:
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    nodes = list(_varying(model.graph, inputs))
    for node in nodes:
        _check_countable(node, place)
    feeds = feed_shapes(inputs, batch, place)
    shapes = _infer(model, nodes, feeds, place)
    needed = [name for node in nodes if node.op_type in RULES for name in filter(None, _ends(node))]
    by_data = any(node.op_type in _BY_DATA for node in nodes)
    if not set(needed) <= shapes.keys() and not by_data:
        shapes = seen_shapes(model, {i.name: (i.dtype, feeds[i.name]) for i in inputs}, place) | shapes
    moving = {item.name for item in inputs} | {name for node in nodes for name in node.output}
    sizes = {name: math.prod(shapes[name]) for name in moving & shapes.keys()}

    def elements(node: NodeProto) -> int:
        return sum(sizes.get(name, 0) for name in (*node.input, *node.output))

    return [
        NodeWork(node, _node_macs(node, shapes, place) if node.op_type in RULES else 0, elements(node))
        for node in nodes
    ]


def _inputs(model: ModelProto, place: str) -> tuple[Input, ...]:
    constants = {tensor.name for tensor in model.graph.initializer}
    found = [value for value in model.graph.input if value.name not in constants]
    if not found:
        raise BenchError(f"{place}: found no input, expected at least one; export the model again")
    inputs = []
    for value in found:
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
            raise BenchError(
                f"{place}: input {value.name!r} is not a tensor of known rank; export it with one"
            )
        sizes = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)
        inputs.append(Input(value.name, TensorProto.DataType.Name(tensor.elem_type), sizes))
    return tuple(inputs)


def _sized(inputs: tuple[Input, ...], sizes: Mapping[str, Shape], place: str) -> tuple[Input, ...]:
    """The inputs with given sizes in the place of open ones, but for the batch."""
    names = [item.name for item in inputs]
    wanted = {names[0] if not name and len(names) == 1 else name: shape for name, shape in sizes.items()}
    if unknown := sorted(wanted.keys() - set(names)):
        raise BenchError(
            f"{place}: found a shape for {unknown[0]!r}, expected one of {', '.join(names)}; give "
            "--input-shape NAME=1,..."
        )
    found = []
    for item in inputs:
        shape = wanted.get(item.name)
        if shape is None:
            found.append(item)
            continue
        pairs = zip(item.shape[1:], shape[1:], strict=False)
        if len(shape) != len(item.shape) or any(own not in (None, new) for own, new in pairs):
            raise BenchError(
                f"{place}: found the shape {'x'.join(map(str, shape))} for input {item}, expected one that "
                "fits it; give --input-shape with the sizes that the file fixes"
            )
        found.append(Input(item.name, item.dtype, (*item.shape[:1], *shape[1:])))
    return tuple(found)


def _fixed_batch(inputs: tuple[Input, ...]) -> int | None:
    """The batch that the file insists on; None if any input leaves its first dimension open."""
    batched = [item.shape[0] for item in inputs if item.shape]
    return None if not batched or None in batched else batched[0]


def _external_files(path: Path, model: ModelProto) -> list[bytes]:
    """Contents of what is beside the file; small numbers, which may be shapes, are put into the model."""
    try:
        names = external.locations(model)
        for tensor in external.tensors_of(model.graph):
            if external.is_external(tensor) and math.prod(tensor.dims) <= SMALL:
                external.take_in(path, tensor)
        return [external.content_of(path, name) for name in names]
    except (LoadError, ValueError) as error:
        raise BenchError(
            f"{path}: its external data cannot be read ({error}); keep the files side by side"
        ) from error


def _infer(
    model: ModelProto, varying: Iterable[NodeProto], inputs: Mapping[str, Shape], place: str
) -> dict[str, Shape]:
    """Shape of every value that inference can find, with the inputs fixed to the given shapes.

    Tensors of more than `SMALL` elements are weights: their shape is needed, not their values.
    """
    fixed = ModelProto()
    fixed.CopyFrom(model)
    for tensor in fixed.graph.initializer:
        if math.prod(tensor.dims) > SMALL:
            _drop_values(tensor)
    fold_small_constants(fixed, varying)
    bound_constants(fixed)
    # Shapes noted by the exporter are symbolic and would win over inferred ones.
    del fixed.graph.value_info[:]
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in fixed.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, inputs.get(value.name, ()), strict=False):
            dim.dim_value = size
    try:
        graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise BenchError(
            f"{place}: shape inference fails ({error}), expected a valid model; export it again"
        ) from error
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer} | dict(inputs)
    for value in (*graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def _drop_values(tensor: TensorProto) -> None:
    for field in ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data"):
        tensor.ClearField(field)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def _varying(graph: GraphProto, inputs: tuple[Input, ...]) -> Iterator[NodeProto]:
    """Nodes that depend on an input, in order; the others are constants to the runtime."""
    seen = {item.name for item in inputs}
    for node in graph.node:
        captures = any(
            attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for attribute in node.attribute
        )
        if captures or not seen.isdisjoint(node.input):
            seen.update(node.output)
            yield node


def _check_countable(node: NodeProto, place: str) -> None:
    odd = node.op_type == "Einsum" and any("..." in a.s.decode() for a in node.attribute)
    if node.op_type in UNCOUNTED or odd or node.domain not in ("", "ai.onnx"):
        raise BenchError(
            f"{_where(node, place)}: its multiply-accumulates cannot be counted, expected only "
            f"{', '.join(sorted(RULES))} to multiply; export without it"
        )


def _where(node: NodeProto, place: str) -> str:
    name = node.name or node.output[0]
    return f"{place}: {node.op_type} {name!r}"


def _ends(node: NodeProto) -> tuple[str, ...]:
    """The values whose shapes say how much a node multiplies."""
    return (*node.input, node.output[0])


def _node_macs(node: NodeProto, shapes: Mapping[str, Shape], place: str) -> int:
    missing = [name for name in filter(None, _ends(node)) if name not in shapes]
    if missing:
        raise BenchError(
            f"{_where(node, place)}: shape inference finds no shape for {missing[0]!r}; "
            "export with fixed sizes"
        )
    return RULES[node.op_type](node, *(shapes.get(name, ()) for name in _ends(node)))


def _conv(node: NodeProto, x: Shape, w: Shape, *more: Shape) -> int:
    return math.prod(more[-1]) * math.prod(w[1:])


def _conv_transpose(node: NodeProto, x: Shape, w: Shape, *more: Shape) -> int:
    return math.prod(x) * math.prod(w[1:])


def _gemm(node: NodeProto, x: Shape, w: Shape, *more: Shape) -> int:
    transposed = any(item.name == "transA" and item.i for item in node.attribute)
    return math.prod(more[-1]) * x[0 if transposed else 1]


def _matmul(node: NodeProto, x: Shape, w: Shape, y: Shape) -> int:
    return math.prod(y) * x[-1]


def _recurrent(node: NodeProto, x: Shape, w: Shape, r: Shape, *more: Shape) -> int:
    """Both matrices of every direction once a step of every sample."""
    return math.prod(x[:2]) * (math.prod(w) + math.prod(r))


def _attention(node: NodeProto, q: Shape, k: Shape, v: Shape, *more: Shape) -> int:
    """Every query with every key and value; `more` are a mask, past keys and values, and the output."""
    past = more[1][-2] if len(more) > 2 and more[1] else 0
    return (math.prod(q) + math.prod(more[-1])) * (k[-2] + past)


def _einsum(node: NodeProto, *shapes: Shape) -> int:
    """One product for every choice of all letters: what two operands take, and one takes none."""
    (equation,) = (a.s.decode() for a in node.attribute if a.name == "equation")
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    if len(terms) == 1:
        return 0
    sizes = {
        c: n for term, shape in zip(terms, shapes[:-1], strict=True) for c, n in zip(term, shape, strict=True)
    }
    return math.prod(sizes.values()) * (len(terms) - 1)


RULES: dict[str, Callable[..., int]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    "Attention": _attention,
    "Einsum": _einsum,
}
"""Operator -> its multiply-accumulates, from the shapes of its inputs, () for those left out, and output."""
