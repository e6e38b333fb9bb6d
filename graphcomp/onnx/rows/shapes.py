"""Rows that give a tensor another shape and keep the order of its elements, or ask for its shape."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made, Value
from graphcomp.onnx.rows.wires import NoRow, Wire, is_open
from graphcomp.onnx.rows.writing import Writing

Shape = tuple[int, ...]

# ---- reading


@reads("Shape")
def read_shape(node: Node, reading: Reading) -> Known:
    """Known in every case."""
    value = node.input(0)
    start, end = node.integer("start", 0), node.integer("end", 1 << 31)
    return Known(tuple(np.array(s[start:end], np.int64) for s in value.shapes))


@reads("Size")
def read_size(node: Node, reading: Reading) -> Known:
    """Known in every case."""
    return Known(tuple(np.array(math.prod(s), np.int64) for s in node.input(0).shapes))


@reads("Reshape")
def read_reshape(node: Node, reading: Reading) -> Made:
    """Sizes that depend on the batch are copied from the input, or left to torch."""
    x = reading.tensor(node.input(0))
    keeps_zero = bool(node.integer("allowzero", 0))
    sizes = node.known(1, "a shape")
    if sizes is None:
        raise node.refusal("no shape", "one", "the file is not valid ONNX")
    cases = range(len(reading.batches))
    said = [[int(n) for n in sizes.values[min(c, len(sizes.values) - 1)].reshape(-1)] for c in cases]
    wanted = [_target(node, x.shapes[c], said[c], keeps_zero) for c in cases]
    if _follows(reading, said) and all(map(_fits, x.shapes, wanted)):
        return place(reading, x, wanted)
    return reshaped(node, reading, x, wanted)


def _follows(reading: Reading, said: Sequence[list[int]]) -> bool:
    """Whether the file computes the sizes from those of its input, for any batch."""
    own = said[reading.batches.index(reading.freed or 1)]
    return any(s != own for s, b in zip(said, reading.batches, strict=True) if b != (reading.freed or 1))


def _fits(shape: Shape, sizes: Shape) -> bool:
    return math.prod(shape) == math.prod(sizes)


def _target(node: Node, shape: Shape, sizes: list[int], keeps_zero: bool) -> Shape:
    """The sizes with 0 and -1 filled in, as the file says; they need not fit where it bakes in a batch."""
    if len(sizes) > 64:
        raise node.refusal(f"{len(sizes)} axes", "at most 64", "the file is not valid ONNX")
    if not keeps_zero:
        if any(n == 0 and d >= len(shape) for d, n in enumerate(sizes)):
            raise node.refusal("a 0 behind the axes that there are", "an axis", "the file is not valid ONNX")
        sizes = [shape[d] if n == 0 else n for d, n in enumerate(sizes)]
    if sizes.count(-1) > 1 or min(sizes, default=0) < -1:
        raise node.refusal(f"sizes {sizes}", "at most one -1", "the file is not valid ONNX")
    if -1 in sizes:
        rest = -math.prod(sizes)
        if rest == 0 or math.prod(shape) % rest:
            raise node.refusal(f"{shape} as {sizes}", "a shape of as many elements", "the file is not valid")
        sizes = [math.prod(shape) // rest if n == -1 else n for n in sizes]
    return tuple(sizes)


def reshaped(node: Node, reading: Reading, x: Made, wanted: Sequence[Shape]) -> Made:
    """A reshape to the shapes that are wanted in every case.

    Where the file was written for one batch, one of its sizes stands for the samples: more of them come with
    every sample that is added. What it says holds for the file's batch, so it is asked there.
    """
    if reading.freed is not None and _grows(reading, x):
        wanted = _freed(node, reading, x, wanted)
    for shape, sizes, batch in zip(x.shapes, wanted, reading.batches, strict=True):
        if not _fits(shape, sizes):
            raise node.refusal(
                f"{shape} as {sizes} at batch {batch}",
                "a shape of as many elements",
                "the file is not valid, or bakes in a batch size",
            )
    return place(reading, x, wanted)


def _grows(reading: Reading, x: Made) -> bool:
    """Whether it holds more with every sample."""
    return (
        len({math.prod(s) for s, b in zip(x.shapes, reading.batches, strict=True) if b != reading.freed}) > 1
    )


def _freed(node: Node, reading: Reading, x: Made, wanted: Sequence[Shape]) -> list[Shape]:
    """The shapes with the samples' axis as long as there are samples.

    It is where as many elements lie before it as before the axis of the input that grows. Where that holds
    more than the samples, the file's own word goes first: its -1 says whether they go with what is before or
    behind.
    """
    batch = reading.freed or 1
    own = reading.batches.index(batch)
    target, shape = wanted[own], x.shapes[own]
    others = [s for s, b in zip(x.shapes, reading.batches, strict=True) if b != batch]
    grows = [d for d in range(x.rank) if any(s[d] != shape[d] for s in others)]
    before = math.prod(shape[: grows[0]])
    places = [j for j in range(len(target)) if math.prod(target[:j]) == before and target[j] % batch == 0]
    if len(grows) != 1 or not places:
        raise node.refusal(
            f"{shape} as {target} at batch {batch}",
            "the samples in one axis of both",
            "samples cannot be told apart behind it",
        )
    at = grows[0] if grows[0] in places else places[0]
    if target[at] != batch and all(map(_fits, x.shapes, wanted)):
        return list(wanted)
    return [
        said if b == batch else (*target[:at], target[at] // batch * b, *target[at + 1 :])
        for said, b in zip(wanted, reading.batches, strict=True)
    ]


def place(reading: Reading, x: Made, wanted: Sequence[Shape]) -> Made:
    """The simplest call that gives these shapes."""
    if all(a == b for a, b in zip(x.shapes, wanted, strict=True)):
        return x
    rank = len(wanted[0])
    for axis in range(x.rank - 1):
        if all(a[:axis] == b[:axis] and len(b) == axis + 1 for a, b in zip(x.shapes, wanted, strict=True)):
            return reading.call(torch.flatten, x, axis)
    open_ = [d for d in range(rank) if len({s[d] for s in wanted}) > 1]
    if len(open_) == 1:
        sizes: list[Any] = [-1 if d in open_ else wanted[0][d] for d in range(rank)]
    else:
        sizes = reading.sizes(wanted, [x])
    return reading.call(torch.reshape, x, tuple(sizes))


@reads("Flatten")
def read_flatten(node: Node, reading: Reading) -> Made:
    """A matrix."""
    x = reading.tensor(node.input(0))
    axis = node.integer("axis", 1)
    axis = x.rank if axis == x.rank else node.along(axis, x.rank)
    return place(reading, x, [(math.prod(s[:axis]), math.prod(s[axis:])) for s in x.shapes])


@reads("Squeeze")
def read_squeeze(node: Node, reading: Reading) -> Made:
    """Without axes of one element."""
    x, axes = reading.tensor(node.input(0)), node.listed("axes", 1)
    if axes is None:
        axes = tuple(d for d in range(x.rank) if all(s[d] == 1 for s in x.shapes))
    gone = tuple(sorted({node.along(a, x.rank) for a in axes}))
    if any(s[d] != 1 for s in x.shapes for d in gone):
        raise node.refusal(f"axes {gone} of {x.shapes}", "axes of one element", "the batch may be baked in")
    if len(gone) == 1:
        return reading.call(torch.squeeze, x, gone[0])
    return reading.call(torch.squeeze, x, gone) if gone else x


@reads("Unsqueeze")
def read_unsqueeze(node: Node, reading: Reading) -> Made:
    """With new axes of one element."""
    x, axes = reading.tensor(node.input(0)), node.listed("axes", 1)
    if axes is None:
        raise node.refusal("no axes", "some", "the file is not valid ONNX")
    rank = x.rank + len(axes)
    for axis in sorted(node.along(a, rank) for a in axes):
        x = reading.call(torch.unsqueeze, x, axis)
    return x


@reads("Expand")
def read_expand(node: Node, reading: Reading) -> Made:
    """Broadcast against a shape."""
    x, sizes = reading.tensor(node.input(0)), node.known(1, "a shape")
    if sizes is None or any(v.size > 64 for v in sizes.values):
        raise node.refusal("no shape", "one", "the file is not valid ONNX")
    wanted = [
        _broadcast(node, shape, tuple(int(n) for n in sizes.values[case].reshape(-1)))
        for case, shape in enumerate(x.shapes)
    ]
    return expanded(reading, x, wanted)


def _broadcast(node: Node, shape: Shape, sizes: Shape) -> Shape:
    try:
        return tuple(np.broadcast_shapes(shape, sizes))
    except ValueError as error:
        raise node.refusal(f"{shape} beside {sizes}", "shapes that go together", "it is not valid") from error


def expanded(reading: Reading, x: Made, wanted: Sequence[Shape]) -> Made:
    """Repeated along axes of one element."""
    if all(a == b for a, b in zip(x.shapes, wanted, strict=True)):
        return x
    new = len(wanted[0]) - x.rank
    columns = list(zip(*wanted, strict=True))
    same = [
        d >= new and all(s[d - new] == n for s, n in zip(x.shapes, c, strict=True))
        for d, c in enumerate(columns)
    ]
    sizes = [-1 if kept else reading.size(c, [x]) for kept, c in zip(same, columns, strict=True)]
    return reading.method("expand", x, *sizes)


@reads("Identity", "Dropout")
def read_identity(node: Node, reading: Reading) -> Value:
    """Nothing; a program has dropout only where it is traced from a module."""
    node.ignore("ratio", "seed")
    if node.operator == "Dropout":
        node.optional(1)
        training = node.constant(2, "training_mode")
        if training is not None and bool(training.array.any()):
            raise node.refusal("training mode", "a file for inference", "export the network in eval mode")
    return node.input(0)


@reads("DepthToSpace", "SpaceToDepth")
def read_depth(node: Node, reading: Reading) -> Made:
    """Between channels and places: torch's shuffle has one of the two orders, the other is written out."""
    x, block = reading.tensor(node.input(0)), node.integer("blocksize", 0)
    spread = node.operator == "DepthToSpace"
    if x.rank != 4 or not 0 < block <= 1 << 10 or spread and x.shape[1] % (block * block):
        raise node.refusal(f"blocks of {block} on {x.shape}", "whole blocks", "the file is not valid ONNX")
    shapes, b = x.shapes, block
    if spread and node.word("mode", "DCR") == "CRD":
        return reading.call(torch.pixel_shuffle, x, block)
    if spread:
        x = place(reading, x, [(n, b, b, c // b**2, h, w) for n, c, h, w in shapes])
        x = reading.call(torch.permute, x, (0, 3, 4, 1, 5, 2))
        return place(reading, x, [(n, c // b**2, h * b, w * b) for n, c, h, w in shapes])
    if any(s[2] % b or s[3] % b for s in shapes):
        raise node.refusal(f"blocks of {block} on {x.shape}", "whole blocks", "the file is not valid ONNX")
    x = place(reading, x, [(n, c, h // b, b, w // b, b) for n, c, h, w in shapes])
    x = reading.call(torch.permute, x, (0, 3, 5, 1, 2, 4))
    return place(reading, x, [(n, c * b**2, h // b, w // b) for n, c, h, w in shapes])


# ---- writing


@writes("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")
def write_reshape(writing: Writing, input: Any, *sizes: Any, **named: Any) -> str:
    """Reshape to the size that is known to come out."""
    if any(isinstance(s, torch.dtype) for s in [*sizes, *named.values()]):
        raise NoRow("memory that is read as another type")
    hints = [part for given in [*sizes, *named.values()] for part in numbers(given)]
    shapes = writing.result.shapes
    is_matrix = isinstance(input, Wire) and input.rank > 2 and len(shapes[0]) == 2
    if is_matrix and all(a[0] == b[0] for a, b in zip(input.shapes, shapes, strict=True)):
        return writing.op("Flatten", input, axis=1)
    return writing.reshape(input, shapes, hints)


@writes("squeeze")
def write_squeeze(writing: Writing, input: Wire, dim: Any = None) -> str:
    """Without axes of one element."""
    if dim is None:
        dims = list(range(input.rank))
    else:
        dims = [input.axis(d) for d in (dim if isinstance(dim, tuple | list) else (dim,))]
    gone = [d for d in dims if not is_open(input.shape[d]) and input.shape[d] == 1]
    return writing.op("Squeeze", input, writing.ints(*gone)) if gone else input.name


@writes("unsqueeze")
def write_unsqueeze(writing: Writing, input: Wire, dim: int) -> str:
    """With an axis more."""
    return writing.op("Unsqueeze", input, writing.ints(dim % (input.rank + 1)))


@writes("expand", "broadcast_to", "expand_as")
def write_expand(writing: Writing, input: Any, *sizes: Any) -> str:
    """Axes of one element repeated without bound; the others are said to be 1, which keeps them."""
    shapes = writing.result.shapes
    before = input.shapes if isinstance(input, Wire) else [tuple(input.shape)] * len(shapes)
    if all(a == b for a, b in zip(before, shapes, strict=True)):
        return writing.name(input)
    hints = [part for given in sizes for part in numbers(given)]
    more = len(shapes[0]) - len(before[0])
    target: list[Any] = []
    for axis, wanted in enumerate(zip(*shapes, strict=True)):
        if axis >= more and tuple(b[axis - more] for b in before) == wanted:
            target.append(1)
        elif len(set(wanted)) == 1:
            target.append(wanted[0])
        else:
            found = [h for h in hints if is_open(h) and h.values == wanted]
            if not found:
                raise NoRow("an open size that its arguments do not say")
            target.append(found[0])
    return writing.op("Expand", input, writing.sizes(target))


@writes("repeat", "tile")
def write_repeat(writing: Writing, input: Wire, *sizes: Any) -> str:
    """Tile."""
    repeats = list(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes)
    repeats = [1] * (input.rank - len(repeats)) + repeats
    name = input.name
    if len(repeats) > input.rank:
        name = writing.op("Unsqueeze", name, writing.ints(*range(len(repeats) - input.rank)))
    return writing.op("Tile", name, writing.sizes(repeats))


@writes("to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long", "bool")
def write_to(writing: Writing, input: Any, *_: Any, dtype: Any = None) -> str:
    """Cast to the type that is known to come out."""
    return writing.typed(input, writing.dtype)


@writes("contiguous", "clone", "detach", "identity", "positive")
def write_identity(writing: Writing, input: Any, *_: Any) -> Any:
    """The value itself."""
    return input


@writes("zeros_like", "new_zeros", "zeros")
def write_zeros(writing: Writing, *_: Any, dtype: Any = None) -> str:
    """Zeros of an open size."""
    return _filled(writing, 0, _)


@writes("ones_like", "new_ones", "ones")
def write_ones(writing: Writing, *_: Any, dtype: Any = None) -> str:
    """Ones of an open size."""
    return _filled(writing, 1, _)


@writes("full_like")
def write_full_like(writing: Writing, input: Wire, fill_value: Any, dtype: Any = None) -> str:
    """One number of an open size."""
    return _filled(writing, fill_value, (input,))


@writes("new_full")
def write_new_full(writing: Writing, input: Wire, size: Any, fill_value: Any, dtype: Any = None) -> str:
    """The same, of a size that is given."""
    return _filled(writing, fill_value, (size,))


def _filled(writing: Writing, value: Any, given: Sequence[Any]) -> str:
    shape = writing.result.shape
    if given and isinstance(given[0], Wire) and writing.result.shapes == given[0].shapes:
        size = writing.op("Shape", given[0])
    else:
        hints = [part for one in given for part in numbers(one)]
        target = []
        for wanted in shape:
            found = [h for h in hints if is_open(wanted) and is_open(h) and h.values == wanted.values]
            if is_open(wanted) and not found:
                raise NoRow("an open size that its arguments do not say")
            target.append(found[0] if is_open(wanted) else wanted)
        size = writing.sizes(target)
    return writing.op("Expand", writing.number(value, writing.dtype), size)


@writes("arange")
def write_arange(writing: Writing, *given: Any, dtype: Any = None) -> str:
    """Range with an open end."""
    start, end, step = {1: (0, *given, 1), 2: (*given, 1), 3: given}[len(given)]
    return writing.op("Range", *(writing.number(part, writing.dtype) for part in (start, end, step)))


def numbers(given: Any) -> list[Any]:
    """The numbers in an argument, or the sizes of a tensor."""
    if isinstance(given, Wire):
        return list(given.shape)
    if isinstance(given, tuple | list):
        return [part for one in given for part in numbers(one)]
    return [given]
