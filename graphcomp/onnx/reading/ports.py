"""Inputs and outputs of a file, and the sizes that it is read for."""

import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from onnx import ModelProto, TensorProto, ValueInfoProto
from torch import Tensor

from graphcomp.errors import LoadError
from graphcomp.ir import Interface, Port
from graphcomp.onnx.interface import HISTORY_PROP
from graphcomp.onnx.subgraphs import required_inputs

BATCHES = (1, 7, 11)
"""What is read for any batch is read for these; a number that follows from one of them is the batch."""

STEPS = (32, 64, 96)
"""How much larger open sizes are in the case that tells them from constants."""

ODD_STEPS = (7, 11, 13)
"""And in one that no network is made for: a size may be a part of another there, rounded up or down."""

TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float32, TensorProto.BFLOAT16: torch.float32,
    TensorProto.DOUBLE: torch.float32, TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32,
    TensorProto.INT16: torch.int16, TensorProto.INT8: torch.int8, TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}  # fmt: skip
"""Types of inputs -> those that a program has for them."""

_MOST_ELEMENTS = 1 << 30


@dataclass(frozen=True)
class Input:
    """An input: its sizes, None for those that the file leaves open."""

    name: str
    kind: int
    sizes: tuple[int | None, ...]
    symbols: tuple[str, ...]

    def shape(self, case: "Case") -> tuple[int, ...]:
        """Its shape in a case."""
        return tuple(
            case.batch if d == 0 else case.sizes.get((self.name, d), n or 0) for d, n in enumerate(self.sizes)
        )


@dataclass(frozen=True)
class Case:
    """One choice of sizes: of the batch, and of other axes, by input and axis, where they are open."""

    batch: int
    sizes: Mapping[tuple[str, int], int] = field(default_factory=dict)


def inputs_of(model: ModelProto) -> list[Input]:
    """The inputs that a file has to be given.

    Raises:
        LoadError: naming one that no program can have.
    """
    found = [_input(v) for v in required_inputs(model)]
    if not found:
        raise LoadError.at("inputs", "none", "at least one", "a file of constants cannot be compressed")
    return found


def _input(info: ValueInfoProto) -> Input:
    place, kind = f"input {info.name!r:.120}", info.type.tensor_type.elem_type
    if not info.type.HasField("tensor_type") or kind not in TYPES:
        raise LoadError.at(place, "no tensor of numbers", "one", "sequences and text cannot be read")
    if not info.type.tensor_type.HasField("shape"):
        raise LoadError.at(place, "no shape", "one", "give the file shapes with onnx.shape_inference")
    dims = info.type.tensor_type.shape.dim
    if not dims:
        raise LoadError.at(
            place,
            "one number for all samples",
            "an axis of samples",
            f"say what it is once and for all: --input {info.name}=VALUE",
        )
    if len(dims) > 16:
        raise LoadError.at(
            place, f"{len(dims)} axes", "1 to 16, one of them the batch", "export it with a batch"
        )
    sizes = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in dims)
    return Input(info.name, kind, sizes, tuple(d.dim_param for d in dims))


def examples(
    inputs: Sequence[Input], given: Mapping[str, Sequence[int]] | None
) -> dict[tuple[str, int], int]:
    """The size of every axis behind the batch, by input and axis: the file's, or what is given.

    Raises:
        LoadError: if a size is open and not given, or given and another one than the file's.
    """
    given = dict(given or {})
    if len(inputs) == 1 and "" in given:
        given[inputs[0].name] = given.pop("")
    unknown = sorted(given.keys() - {i.name for i in inputs})
    names = ", ".join(i.name for i in inputs)
    if unknown:
        raise LoadError.at("--input-shape", f"{unknown[0]!r}", f"one of {names}", "name an input of the file")
    found: dict[tuple[str, int], int] = {}
    for i in inputs:
        shape = given.get(i.name)
        if shape is not None and (len(shape) != len(i.sizes) or min(shape) < 1):
            raise LoadError.at(f"--input-shape {i.name}", tuple(shape), _written(i), "give one size an axis")
        for axis, size in enumerate(i.sizes[1:], start=1):
            wanted = None if shape is None else int(shape[axis])
            if size is None and wanted is None:
                raise LoadError.at(
                    f"input {i.name!r:.120}",
                    f"open sizes: {_written(i)}",
                    "the size of an example",
                    f"give --input-shape {i.name}={_template(i)}, with a size for every ?",
                )
            if size is not None and wanted is not None and wanted != size:
                raise LoadError.at(
                    f"--input-shape {i.name}",
                    tuple(shape or ()),
                    _written(i),
                    "leave what the file has fixed",
                )
            found[i.name, axis] = size if size is not None else wanted or 0
        elements = 1
        for axis in range(1, len(i.sizes)):
            elements *= found[i.name, axis]
        if elements > _MOST_ELEMENTS:
            raise LoadError.at(
                f"input {i.name!r:.120}", _written(i), f"at most {_MOST_ELEMENTS} elements", "it is no input"
            )
    return found


def _template(i: Input) -> str:
    """What to write for it: `1,3,?,?`."""
    return ",".join(["1", *(str(n or "?") for n in i.sizes[1:])])


def _written(i: Input) -> str:
    return "x".join(str(n if n is not None else s or "?") for n, s in zip(i.sizes, i.symbols, strict=True))


def opened(
    inputs: Sequence[Input], sizes: Mapping[tuple[str, int], int], larger_by: Sequence[int] = STEPS
) -> dict[tuple[str, int], int]:
    """Larger sizes for all axes that the file leaves open, equal ones for one symbol; empty without any."""
    steps: dict[str, int] = {}
    larger = {}
    for i in inputs:
        for axis, size in enumerate(i.sizes[1:], start=1):
            if size is None:
                symbol = i.symbols[axis] or f"{i.name}.{axis}"
                step = steps.setdefault(symbol, larger_by[len(steps) % len(larger_by)])
                larger[i.name, axis] = sizes[i.name, axis] + step
    return larger


def example_inputs(inputs: Sequence[Input], case: Case) -> tuple[Tensor, ...]:
    """Seeded inputs: normal ones, and zeros for whole numbers, which every network takes."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(i.shape(case), generator=generator)
        if TYPES[i.kind].is_floating_point
        else torch.zeros(i.shape(case), dtype=TYPES[i.kind])
        for i in inputs
    )


def interface_of(
    model: ModelProto,
    inputs: Sequence[Input],
    opset: int,
    open_axes: Mapping[str, Mapping[int, str]],
    remarks: Sequence[str],
) -> Interface:
    """What the file says of itself.

    Args:
        model: of the file.
        inputs: of the network.
        opset: of the file.
        open_axes: the axes that the program leaves open, by input or output, and what they are called.
        remarks: of the reader.
    """
    docs = {v.name: v.doc_string for v in (*model.graph.input, *model.graph.output)}

    def port(name: str) -> Port:
        return Port(name=name, doc=docs.get(name, ""), axes=dict(open_axes.get(name, {})))

    try:
        return Interface(
            inputs=tuple(port(i.name) for i in inputs),
            outputs=tuple(port(o.name) for o in model.graph.output),
            metadata={p.key: p.value for p in model.metadata_props if p.key != HISTORY_PROP},
            doc=model.doc_string,
            graph_doc=model.graph.doc_string,
            opset=opset,
            producer=f"{model.producer_name} {model.producer_version}".strip(),
            remarks=tuple(remarks),
        )
    except ValueError as error:
        raise LoadError.at(
            "file", f"{str(error)!r:.300}", "names and texts of reasonable size", "clean it up"
        ) from error


_ODD = re.compile(r"\W+", re.ASCII)


def placeholder_name(name: str, index: int) -> str:
    """An input's name as an identifier."""
    clean = _ODD.sub("_", name).strip("_")[:64]
    free = clean.isidentifier() and not keyword.iskeyword(clean) and clean != "self"
    return clean if free else f"input_{clean or index}"
