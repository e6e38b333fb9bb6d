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
from graphcomp.onnx.rows.writing import Call, Writing

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
    wanted = [
        _target(
            node,
            x.shapes[case],
            [int(n) for n in sizes.values[min(case, len(sizes.values) - 1)].reshape(-1)],
            keeps_zero,
        )
        for case in range(len(reading.batches))
    ]
    return reshaped(node, reading, x, wanted)


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
    if reading.freed is not None and len({math.prod(s) for s in x.shapes}) > 1:
        wanted = _freed(node, reading, x, wanted)
    for shape, sizes, batch in zip(x.shapes, wanted, reading.batches, strict=True):
        if math.prod(shape) != math.prod(sizes):
            raise node.refusal(
                f"{shape} as {sizes} at batch {batch}",
                "a shape of as many elements",
                "the file is not valid, or bakes in a batch size",
            )
    return place(reading, x, wanted)


def _freed(node: Node, reading: Reading, x: Made, wanted: Sequence[Shape]) -> list[Shape]:
    """The shapes with the samples' axis as long as there are samples.

    It is where as many elements lie before it as before the axis of the input that grows.
    """
    batch = reading.freed or 1
    own = reading.batches.index(batch)
    target, shape = wanted[own], x.shapes[own]
    grows = [d for d in range(x.rank) if len({s[d] for s in x.shapes}) > 1]
    before = math.prod(shape[: grows[0]])
    places = [j for j in range(len(target)) if math.prod(target[:j]) == before and target[j] % batch == 0]
    if len(grows) != 1 or not places:
        raise node.refusal(
            f"{shape} as {target} at batch {batch}",
            "the samples in one axis of both",
            "samples cannot be told apart behind it",
        )
    at = grows[0] if grows[0] in places else places[0]
    return [(*target[:at], target[at] // batch * b, *target[at + 1 :]) for b in reading.batches]


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


@writes("flatten")
def write_flatten(call: Call, writing: Writing) -> str:
    """Flatten where it makes a matrix, else a Reshape of sizes that are copied from the input."""
    given = call.given
    shape = call.value.shape
    if given["start_dim"] == 1 and len(shape) == 2:
        return writing.add("Flatten", [writing.value(given["input"])], axis=1)
    target = writing.value([0] * given["start_dim"] + [-1] + list(shape[given["start_dim"] + 1 :]))
    assert math.prod(shape)
    return writing.add("Reshape", [writing.value(given["input"]), target])
