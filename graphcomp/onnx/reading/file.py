"""An ONNX file is opened: bounded, valid in form, with the numbers of its external data.

Files come from anywhere. Nothing in one is run, sizes are compared with what is really there before memory is
asked for, external data come from regular files in the file's own folder, and what an expansion of functions
would make is counted before it is made.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.inliner import inline_local_functions

from graphcomp.errors import LoadError, first_line
from graphcomp.onnx.reading.older import OLDEST, modernise
from graphcomp.onnx.rows import Array
from graphcomp.runtime import external

MOST_NODES = 1 << 17
"""Of a file, functions expanded; the largest networks in use have some ten thousand."""

_MOST_BYTES = 2**31 - 1  # what protobuf reads
_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class OnnxSource:
    """A file that was opened.

    Attributes:
        path: of the file.
        model: with functions expanded, external data read in.
        opset: version of the default operator set.
        remarks: how the model is another than the file's.
    """

    path: Path
    model: ModelProto
    opset: int
    remarks: tuple[str, ...] = ()


def open_file(path: Path) -> OnnxSource:
    """Open and check an ONNX file.

    Raises:
        LoadError: if it is no ONNX file, is too large, asks for operators of other domains or for data
            outside of its folder, or has no default operator set that is known here.
    """
    model = _parse(path)
    opset = _opset(path, model)
    _refuse_foreign(path, model)
    if model.functions:
        model = _expanded(path, model)
    _refuse_nameless(path, model)
    if len(model.graph.node) > MOST_NODES:
        raise LoadError.at(
            path.name, f"{len(model.graph.node)} nodes", f"at most {MOST_NODES}", "this is no network"
        )
    _read_external(path, model)
    if opset >= OLDEST:
        return OnnxSource(path, model, opset)
    return OnnxSource(path, model, OLDEST, (modernise(path.name, model, opset),))


def _parse(path: Path) -> ModelProto:
    try:
        size = path.stat().st_size
        if not path.is_file() or size > _MOST_BYTES:
            raise LoadError.at(
                path.name,
                f"{size} bytes",
                f"a file of at most {_MOST_BYTES}",
                "save it with external data",
            )
        content = path.read_bytes()
    except OSError as error:
        raise LoadError.at(path, first_line(error), "a file that can be read", "check the path") from error
    model = ModelProto()
    try:
        model.ParseFromString(content)
    # protobuf's own error, whose package is not ours to import.
    except Exception as error:
        raise LoadError.at(
            path.name, "no ONNX file", "one", "check that it was downloaded completely"
        ) from error
    if not model.graph.node or not model.graph.output:
        raise LoadError.at(path.name, "no nodes or no outputs", "a network", "check the file")
    _require_text(path, model)
    return model


def _require_text(path: Path, model: ModelProto) -> None:
    """Refuse names that are not UTF-8, which protobuf hands out as bytes."""
    stack: list[tuple[str, Any]] = [("file", model)]
    while stack:
        place, message = stack.pop()
        for field, value in message.ListFields():
            values = [value] if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value
            if field.type == field.TYPE_MESSAGE:
                stack.extend((field.name, v) for v in values)
            elif field.type == field.TYPE_STRING and any(isinstance(v, bytes) for v in values):
                raise LoadError.at(
                    f"{path.name}: {place}: {field.name}", "bytes", "text", "the file is damaged, or no ONNX"
                )


def _opset(path: Path, model: ModelProto) -> int:
    versions = {o.version for o in model.opset_import if o.domain in _DOMAINS}
    newest = onnx.defs.onnx_opset_version()
    if len(versions) != 1 or not 1 <= min(versions) <= newest:
        raise LoadError.at(
            path.name,
            f"operator sets {sorted(versions)}",
            f"one from 1 to {newest}",
            "install a newer onnx",
        )
    return int(versions.pop())


_ADVICE = {
    "com.microsoft": "it was written by ONNX Runtime's optimiser: give the file that this one was made from",
    "ai.onnx.ml": "this is no neural network; only those can be compressed",
    "ai.onnx.training": "export the network for inference",
}


def _refuse_foreign(path: Path, model: ModelProto) -> None:
    own = {f.domain for f in model.functions}
    for node in _nodes(model.graph):
        if node.domain not in _DOMAINS and node.domain not in own:
            raise LoadError.at(
                f"{path.name}: {node.domain}.{node.op_type} {node.name!r:.120}",
                "an operator that ONNX does not have",
                "those of the default domain",
                _ADVICE.get(node.domain, "export the network without custom operators"),
            )


def _refuse_nameless(path: Path, model: ModelProto) -> None:
    """Refuse outputs that are left out among any number of them, on which ONNX Runtime ends the process."""
    for node in _nodes(model.graph):
        if node.op_type in ("Split", "If", "Loop", "Scan") and not all(node.output):
            raise LoadError.at(
                f"{path.name}: {node.op_type} {node.name!r:.120}",
                "an output without a name",
                "a name for each",
                "give it one",
            )


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes, those of subgraphs with them."""
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            yield node
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)


def _expanded(path: Path, model: ModelProto) -> ModelProto:
    """The file with its functions written out, after counting how many nodes that makes."""
    bodies = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    open_: set[tuple[str, str]] = set()

    def size(key: tuple[str, str], depth: int) -> int:
        if key in open_ or depth > 64:
            raise LoadError.at(
                f"{path.name}: function {key[1]!r:.120}", "one that calls itself", "others", "it is not valid"
            )
        if key not in sizes:
            open_.add(key)
            sizes[key] = sum(count(n, depth + 1) for n in bodies[key].node)
            open_.discard(key)
        return sizes[key]

    def count(node: NodeProto, depth: int) -> int:
        key = (node.domain, node.op_type)
        return 1 if key not in bodies else size(key, depth)

    total = sum(count(n, 0) for n in _nodes(model.graph))
    if total > MOST_NODES:
        raise LoadError.at(
            path.name, f"functions of {total} nodes", f"at most {MOST_NODES}", "this is no network"
        )
    try:
        return inline_local_functions(model)
    # The inliner is C++ and raises whatever it finds wrong.
    except Exception as error:
        raise LoadError.at(
            path.name, f"{first_line(error)!r:.200}", "functions that can be expanded", "it is not valid"
        ) from error


# ---- numbers


def array_of(tensor: TensorProto) -> Array:
    """The numbers of a tensor, whose size is compared with its shape first; LoadError naming it."""
    place = f"tensor {tensor.name!r:.120}"
    shape = tuple(tensor.dims)
    elements = 1
    for n in shape:
        elements *= n
        if not 0 <= n <= external.MOST_BYTES or elements > external.MOST_BYTES:
            raise LoadError.at(place, f"shape {shape}", "one of a tensor", "the file is not valid ONNX")
    try:
        bits = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
        held = len(tensor.raw_data) or tensor.ByteSize()
        if elements * min(bits, 4) > 8 * held + 64:
            raise LoadError.at(
                place, f"shape {shape} and {held} bytes", "as many numbers as it has", "it was cut off"
            )
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    except LoadError:
        raise
    # numpy and onnx raise several kinds for what is malformed.
    except Exception as error:
        raise LoadError.at(
            place, f"{first_line(error)!r:.200}", "numbers of a type that is known", "it is not valid ONNX"
        ) from error


def _read_external(path: Path, model: ModelProto) -> None:
    for tensor in external.tensors_of(model.graph):
        if external.is_external(tensor):
            external.take_in(path, tensor)


def initializers(model: ModelProto) -> Mapping[str, TensorProto]:
    """Every initialiser by name; sparse ones are refused."""
    if model.graph.sparse_initializer:
        raise LoadError.at("file", "sparse initialisers", "dense ones", "write them out")
    return {t.name: t for t in model.graph.initializer}
