"""Rows that write into parts of a tensor, or take parts by several coordinates."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.shapes import place
from graphcomp.onnx.rows.values import Array, Known, Made
from graphcomp.onnx.rows.wires import NoRow, Wire
from graphcomp.onnx.rows.writing import Writing

# ---- reading

_COMBINED = {"add": operator.add, "mul": operator.mul, "max": torch.maximum, "min": torch.minimum}

_CUT = "cut the file in front of it with onnx.utils.extract_model, and go on from there in your code"


@reads("ScatterND")
def read_scatter_nd(node: Node, reading: Reading) -> Made:
    """Values into places that are known: `y[..., 2:4] = values`, as exporters write it."""
    x, updates = reading.tensor(node.input(0)), reading.tensor(node.input(2))
    indices, combine = _places(node), _combination(node)
    depth = indices.values[0].shape[-1]
    if not 0 < depth <= x.rank:
        raise node.refusal(f"{depth} coordinates for {x.rank} axes", "at most as many", "it is not valid")
    places = [_from_start(node, v, s) for v, s in zip(indices.values, x.shapes, strict=True)]
    found = [_box(p) for p in places]
    boxes = [box for box in found if box is not None]
    if len(boxes) < len(found):
        whole = x.shapes
        x, boxes = _in_one_axis(node, reading, x, places)
        shapes = _shapes(boxes, x)
        if _counts(shapes) != _counts(updates.shapes):
            raise node.refusal("values of another shape", "one for each place", "it is not valid ONNX")
        flat = _written(node, reading, x, place(reading, updates, shapes), boxes, 0, combine)
        return place(reading, flat, whole)
    shapes = _shapes(boxes, x)
    if (
        _counts(shapes) != _counts(updates.shapes)
        and reading.freed == 1
        and {len(b[0]) for b in boxes} == {1}
    ):
        # places in the one sample that the file was written for
        boxes = [[np.arange(s[0]), *b[1:]] for b, s in zip(boxes, x.shapes, strict=True)]
        shapes = _shapes(boxes, x)
    if _counts(shapes) != _counts(updates.shapes):
        raise node.refusal("values of another shape", "one for each place", "it is not valid ONNX")
    return _written(node, reading, x, place(reading, updates, shapes), boxes, 0, combine)


def _shapes(boxes: list[list[Array]], x: Made) -> list[tuple[int, ...]]:
    """Of the values that go into the boxes, in every case."""
    return [(*map(len, box), *s[len(box) :]) for box, s in zip(boxes, x.shapes, strict=True)]


def _counts(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    return [math.prod(s) for s in shapes]


def _places(node: Node) -> Known:
    indices = node.known(1, "places")
    if indices is None or not indices.values[0].ndim:
        raise node.refusal("no places", "some", "the file is not valid ONNX")
    return indices


def _combination(node: Node) -> Any:
    said = node.word("reduction", "none")
    if said != "none" and said not in _COMBINED:
        raise node.refusal(f"reduction={said!r}", "a known one", "the file is not valid ONNX")
    return _COMBINED.get(said)


def _from_start(node: Node, indices: Array, shape: tuple[int, ...]) -> Array:
    """A row of coordinates for every place, none of them counted from the end."""
    places = indices.reshape(-1, indices.shape[-1])
    sizes = np.array(shape[: places.shape[1]])
    if (places < -sizes).any() or (places >= sizes).any():
        raise node.refusal("places outside", "those there are", "the file is not valid ONNX")
    return np.where(places < 0, places + sizes, places)


def _box(places: Array) -> list[Array] | None:
    """The positions along every axis, if places are all that these make, in order; None if they are not."""
    axes = [p[np.sort(np.unique(p, return_index=True)[1])] for p in places.T]
    made = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, places.shape[1])
    return axes if made.shape == places.shape and (made == places).all() else None


def _in_one_axis(
    node: Node, reading: Reading, x: Made, places: Sequence[Array]
) -> tuple[Made, list[list[Array]]]:
    """`x` with the axes that are indexed as one, and positions along it: the same places in every sample."""
    depth, open_ = places[0].shape[1], len({s[0] for s in x.shapes}) > 1
    positions = []
    for each, shape in zip(places, x.shapes, strict=True):
        if open_:
            # A file that was written for one sample has the places of that one.
            samples = 1 if reading.freed == 1 and not each[:, 0].any() else shape[0]
            own = each.reshape(samples, -1, depth) if len(each) % samples == 0 else each[:, None]
            numbers = np.arange(len(own))[:, None]
            if (own[:, :, 0] != numbers).any() or (own[:, :, 1:] != own[:1, :, 1:]).any():
                raise node.refusal("other places in every sample", "the same", _CUT)
            each = own[0, :, 1:]
        positions.append(np.ravel_multi_index(tuple(each.T), shape[open_:depth]))
    if (
        any(not np.array_equal(p, positions[0]) for p in positions)
        or len({s[open_:depth] for s in x.shapes}) > 1
    ):
        raise node.refusal("places that follow from a size", "constant ones", "give --input-shape")
    if len(np.unique(positions[0])) < len(positions[0]):
        raise node.refusal("a place that is written twice", "each once", _CUT)
    flat = [(*s[:open_], math.prod(s[open_:depth]), *s[depth:]) for s in x.shapes]
    boxes = [[*([np.arange(s[0])] if open_ else []), np.asarray(positions[0])] for s in x.shapes]
    return place(reading, x, flat), boxes


def _written(
    node: Node, reading: Reading, x: Made, updates: Made, boxes: list[list[Array]], axis: int, combine: Any
) -> Made:
    """`x` with the box replaced, axis by axis: what lies around it is joined to what is new."""
    if axis == len(boxes[0]):
        return updates if combine is None else reading.call(combine, x, updates)
    sizes = [s[axis] for s in x.shapes]
    if all(np.array_equal(b[axis], np.arange(n)) for b, n in zip(boxes, sizes, strict=True)):
        return _written(node, reading, x, updates, boxes, axis + 1, combine)
    positions = boxes[0][axis]
    if len(set(sizes)) != 1 or any(not np.array_equal(b[axis], positions) for b in boxes):
        raise node.refusal("a part of an axis of an open size", "all of it", _CUT)
    if not (np.diff(positions) == 1).all():
        return _interleaved(node, reading, x, updates, boxes, axis, combine)
    start, end, size = int(positions[0]), int(positions[-1]) + 1, sizes[0]
    before = (slice(None),) * axis

    def part(a: int, b: int) -> Made:
        return reading.call(operator.getitem, x, (*before, slice(a, b)))

    inner = _written(node, reading, part(start, end), updates, boxes, axis + 1, combine)
    around = [part(0, start)] if start else []
    behind = [part(end, size)] if end < size else []
    return reading.call(torch.cat, [*around, inner, *behind], axis)


def _interleaved(
    node: Node, reading: Reading, x: Made, updates: Made, boxes: list[list[Array]], axis: int, combine: Any
) -> Made:
    """Positions with others between them: every one is taken from what is old and new together."""
    positions, size = boxes[0][axis], x.shape[axis]
    old = reading.call(torch.index_select, x, axis, reading.tensor(Known((positions,)), "positions"))
    new = _written(node, reading, old, updates, boxes, axis + 1, combine)
    source = np.arange(size)
    source[positions] = size + np.arange(len(positions))
    both = reading.call(torch.cat, [x, new], axis)
    return reading.call(torch.index_select, both, axis, reading.tensor(Known((source,)), "positions"))


@reads("ScatterElements", "Scatter")
def read_scatter_elements(node: Node, reading: Reading) -> Made:
    """Every value to a place along an axis."""
    x, updates = reading.tensor(node.input(0)), reading.tensor(node.input(2))
    axis, said = node.axis("axis", 0, x.rank), node.word("reduction", "none")
    index = reading.tensor(node.input(1))
    if index.shapes != updates.shapes or index.rank != x.rank:
        raise node.refusal("values of another shape", "one for each place", "it is not valid ONNX")
    index = _from_front(reading, index, x, axis)
    if said == "none":
        return reading.call(torch.scatter, x, axis, index, updates)
    kinds = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    if said not in kinds:
        raise node.refusal(f"reduction={said!r}", "a known one", "the file is not valid ONNX")
    return reading.call(torch.scatter_reduce, x, axis, index, updates, kinds[said])


def _from_front(reading: Reading, index: Made, x: Made, axis: int) -> Made:
    """Positions along an axis of `x`, none of them counted from its end."""
    index = index if index.dtype == torch.int64 else reading.method("to", index, torch.int64)
    size = reading.size([s[axis] for s in x.shapes], [x])
    negative, wrapped = reading.call(torch.lt, index, 0), reading.call(operator.add, index, size)
    return reading.call(torch.where, negative, wrapped, index)


@reads("GatherElements")
def read_gather_elements(node: Node, reading: Reading) -> Made:
    """An element for every element of the index."""
    x, index = reading.tensor(node.input(0)), reading.tensor(node.input(1))
    axis = node.axis("axis", 0, x.rank)
    if any(
        a[d] != b[d] for a, b in zip(x.shapes, index.shapes, strict=True) for d in range(x.rank) if d != axis
    ):
        raise node.refusal("an index of another shape", "that of the data", "torch takes no other")
    return reading.call(torch.gather, x, axis, _from_front(reading, index, x, axis))


@reads("GatherND")
def read_gather_nd(node: Node, reading: Reading) -> Made:
    """Elements at places of several coordinates, which are known: rows of what is flattened."""
    x, batch = reading.tensor(node.input(0)), node.integer("batch_dims", 0)
    indices = node.constant(1, "places")
    if indices is None or indices.array.ndim < 1 or batch != 0:
        raise node.refusal(f"batch_dims={batch}", "places for all samples", _CUT)
    places = indices.array
    depth = places.shape[-1]
    if not 0 < depth <= x.rank or len({s[:depth] for s in x.shapes}) != 1:
        raise node.refusal("places among samples", "places within each", _CUT)
    sizes = np.array(x.shape[:depth])
    if (places < -sizes).any() or (places >= sizes).any():
        raise node.refusal("places outside", "those there are", "the file is not valid ONNX")
    flat = np.ravel_multi_index(
        tuple(np.where(places < 0, places + sizes, places).reshape(-1, depth).T), tuple(sizes)
    )
    rows = reading.call(torch.flatten, x, 0, depth - 1) if depth > 1 else x
    rows = reading.call(torch.index_select, rows, 0, reading.tensor(Known((np.asarray(flat),)), "positions"))
    return place(reading, rows, [(*places.shape[:-1], *s[depth:]) for s in x.shapes])


@reads("ReverseSequence")
def read_reverse_sequence(node: Node, reading: Reading) -> Made:
    """The other way round in time, for sequences that are as long as they can be."""
    x, lengths = reading.tensor(node.input(0)), node.known(1, "lengths of sequences")
    time, batch = node.axis("time_axis", 0, x.rank), node.axis("batch_axis", 1, x.rank)
    del batch
    if lengths is None or any((v != s[time]).any() for v, s in zip(lengths.values, x.shapes, strict=True)):
        raise node.refusal("shorter sequences", "whole ones", "torch turns all of them")
    return reading.call(torch.flip, x, (time,))


# ---- writing

_REDUCTIONS = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}


@writes("scatter", "scatter_reduce", "scatter_add")
def write_scatter(
    writing: Writing, input: Wire, dim: int, index: Any, src: Any = None, reduce: Any = None,
    include_self: bool = True, value: Any = None,
) -> str:  # fmt: skip
    """ScatterElements."""
    if value is not None or not isinstance(src, Wire | torch.Tensor):
        raise NoRow("one value for all places")
    if not include_self:
        raise NoRow("include_self=False")
    said = (
        "sum" if writing.operator == "scatter_add" else {"add": "sum", "multiply": "prod"}.get(reduce, reduce)
    )
    if said is not None and said not in _REDUCTIONS:
        raise NoRow(f"reduce={said!r}")
    if _known_shapes(src, index) != _known_shapes(index, src):
        raise NoRow("more values than places")
    return writing.op(
        "ScatterElements", input, index, writing.typed(src, input.dtype), axis=input.axis(dim),
        reduction=None if said is None else _REDUCTIONS[said],
    )  # fmt: skip


def _known_shapes(value: Any, other: Any) -> list[tuple[int, ...]]:
    """In every setting; a stored tensor has one in all."""
    count = len(other.shapes) if isinstance(other, Wire) else 1
    return list(value.shapes) if isinstance(value, Wire) else [tuple(value.shape)] * count
