"""Rows that move elements: transpose, concatenate, slice, gather, pad."""

import operator
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from graphcomp.onnx.rows.layers import fill
from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.shapes import expanded
from graphcomp.onnx.rows.strided import strided
from graphcomp.onnx.rows.values import Array, Known, Made, Value
from graphcomp.onnx.rows.windows import beside
from graphcomp.onnx.rows.wires import NoRow, Wire, is_open
from graphcomp.onnx.rows.writing import Writing

# ---- reading


@reads("Transpose")
def read_transpose(node: Node, reading: Reading) -> Made:
    """A permutation of axes."""
    x = reading.tensor(node.input(0))
    order = node.integers("perm", tuple(reversed(range(x.rank)))) or ()
    if sorted(order) != list(range(x.rank)):
        raise node.refusal(f"perm={order}", f"an order of {x.rank} axes", "the file is not valid ONNX")
    return x if list(order) == sorted(order) else reading.call(torch.permute, x, order)


@reads("Concat")
def read_concat(node: Node, reading: Reading) -> Made:
    """Along an axis; constants that stand for one sample are repeated where the batch was baked in."""
    values = node.all_inputs()
    made = next((v for v in values if isinstance(v, Made)), None)
    rank = made.rank if made is not None else len(values[0].shapes[0])
    axis = node.axis("axis", 0, rank)
    tensors = [reading.tensor(v) for v in values]
    if made is not None and reading.freed is not None and axis != 0:
        tensors = [
            t if isinstance(v, Made) else _repeated(reading, t, made)
            for t, v in zip(tensors, values, strict=True)
        ]
    return tensors[0] if len(tensors) == 1 else reading.call(torch.cat, tensors, axis)


def _repeated(reading: Reading, x: Made, beside: Made) -> Made:
    """A constant of as many samples as another operand, where it holds one."""
    if x.rank != beside.rank or x.shape[0] != 1 or len({s[0] for s in beside.shapes}) == 1:
        return x
    return expanded(reading, x, [(b[0], *s[1:]) for s, b in zip(x.shapes, beside.shapes, strict=True)])


@reads("Slice")
def read_slice(node: Node, reading: Reading) -> Made:
    """Python's slices; steps back are a flip before."""
    x = reading.tensor(node.input(0))
    if node.has("starts"):
        every = len(reading.batches)
        starts, ends, axes = (
            None if (found := node.integers(name)) is None else [list(found)] * every
            for name in ("starts", "ends", "axes")
        )
        steps = None
    else:
        starts, ends, axes, steps = (
            _cases(node, i, n) for i, n in enumerate(("starts", "ends", "axes", "steps"), start=1)
        )
    if starts is None or ends is None:
        raise node.refusal("no starts or ends", "both", "the file is not valid ONNX")
    count = len(starts[0])
    along = axes[0] if axes is not None else list(range(count))
    lists = [lists for lists in (starts, ends, axes, steps) if lists is not None]
    if any(len(numbers) != count for lists_ in lists for numbers in lists_) or count > x.rank:
        raise node.refusal("lists of different lengths", "one number an axis", "the file is not valid ONNX")
    items: list[Any] = [slice(None)] * x.rank
    flipped: list[int] = []
    for i in range(count):
        axis = node.along(along[i], x.rank)
        step = 1 if steps is None else steps[0][i]
        if step == 0:
            raise node.refusal("a step of 0", "another", "the file is not valid ONNX")
        sizes = [s[axis] for s in x.shapes]
        said = {(a[i], b[i]) for a, b in zip(starts, ends, strict=True)}
        if len(set(sizes)) > 1 and len(said) == 1:
            items[axis] = _as_said(*said.pop(), step)
            flipped += [axis] if step < 0 else []
            continue
        bounds = [_bounds(a[i], b[i], step, n) for a, b, n in zip(starts, ends, sizes, strict=True)]
        if step < 0:
            flipped.append(axis)
            bounds = [(n - 1 - a, n - 1 - b) for (a, b), n in zip(bounds, sizes, strict=True)]
        items[axis] = _item(reading, x, axis, bounds, abs(step))
    if flipped:
        x = reading.call(torch.flip, x, tuple(flipped))
    while items and items[-1] == slice(None):
        items.pop()
    return reading.call(operator.getitem, x, tuple(items)) if items else x


def _cases(node: Node, index: int, what: str) -> list[list[int]] | None:
    """A list of whole numbers in every case."""
    value = node.known(index, what)
    return None if value is None else [[int(n) for n in v.reshape(-1)] for v in value.values]


def _bounds(start: int, end: int, step: int, size: int) -> tuple[int, int]:
    """(first, one behind the last) as positions, both within the axis."""
    first, last, _ = slice(start, end, step).indices(size)
    return first, max(last, first) if step > 0 else min(last, first)


def _as_said(start: int, end: int, step: int) -> slice:
    """The slice that holds for every size: bounds behind the axis are cut off as Python does.

    Behind a flip the position p is -1 - p, from the other end.
    """
    if step < 0:
        start, end = -1 - start, -1 - end
    return slice(start or None, None if end >= _BEHIND else end, None if abs(step) == 1 else abs(step))


_BEHIND = (1 << 31) - 1
"""Behind every axis: what files say for no end."""


def _item(reading: Reading, x: Made, axis: int, bounds: list[tuple[int, int]], step: int) -> slice:
    """The slice that has these bounds in every case, counted from the end where the size is open."""
    sizes = [s[axis] for s in x.shapes]

    def number(values: list[int], at_end: bool) -> Any:
        if len(set(values)) == 1 and (len(set(sizes)) == 1 or not at_end or values[0] < min(sizes)):
            return values[0]
        behind = {v - n for v, n in zip(values, sizes, strict=True)}
        if behind == {0}:
            return None if at_end else reading.size(values, [x])
        return behind.pop() if len(behind) == 1 and max(behind) < 0 else reading.size(values, [x])

    firsts, lasts = [b[0] for b in bounds], [b[1] for b in bounds]
    if set(firsts) == {0} and lasts == sizes:
        return slice(None) if step == 1 else slice(None, None, step)
    return slice(
        number(firsts, False), None if lasts == sizes else number(lasts, True), None if step == 1 else step
    )


@reads("Split")
def read_split(node: Node, reading: Reading) -> tuple[Made, ...]:
    """Pieces along an axis, of the sizes given or as equal as can be."""
    x = reading.tensor(node.input(0))
    axis = node.axis("axis", 0, x.rank)
    count = node.integer("num_outputs", len(node.outputs))
    given = node.listed("split", 1)
    sizes = {s[axis] for s in x.shapes}
    if len(sizes) != 1:
        raise node.refusal("an axis of an open size", "a fixed size", "samples cannot be split")
    (size,) = sizes
    if given is None:
        if not 0 < count <= max(size, 1):
            raise node.refusal(f"{count} pieces of {size}", "at least one element each", "it is not valid")
        each = -(-size // count)
        given = (*(each,) * (count - 1), size - each * (count - 1))
    if sum(given) != size or min(given, default=0) < 0:
        raise node.refusal(f"pieces {given}", f"{size} together", "the file is not valid ONNX")
    if len(given) == 1:
        return (x,)
    return reading.parts(reading.call(torch.split, x, list(given), axis))


@reads("Gather")
def read_gather(node: Node, reading: Reading) -> Made:
    """One position, a range, chosen ones, or rows of a table of words."""
    data, index = node.input(0), node.input(1)
    rank = len(data.shapes[0])
    axis = node.axis("axis", 0, rank)
    if isinstance(index, Made):
        return _looked_up(node, reading, data, index, axis)
    x = reading.tensor(data)
    found = strided(reading, x, index) if axis == 0 and x.rank == 1 else None
    if found is not None:
        return found
    if index.is_constant:
        return picked(node, reading, x, axis, index.array)
    behind = Known(tuple(v - s[axis] for v, s in zip(index.values, x.shapes, strict=True)))
    if not behind.is_constant or (behind.array >= 0).any():
        raise node.refusal("positions that follow from a size", "constant ones", "give --input-shape")
    return picked(node, reading, x, axis, behind.array)


def _looked_up(node: Node, reading: Reading, data: Value, index: Made, axis: int) -> Made:
    if (
        isinstance(data, Known)
        and data.is_constant
        and data.array.ndim == 2
        and axis == 0
        and data.array.dtype.kind == "f"
    ):
        count, width = data.array.shape
        module = nn.Embedding(count, width, device="meta")
        fill(module, weight=data)
        return reading.layer(node, module, index, key=("embedding", data.name) if data.name else None)
    x = reading.tensor(data)
    flat = reading.call(torch.flatten, index) if index.rank != 1 else index
    result = reading.call(torch.index_select, x, axis, flat)
    if index.rank == 0:
        return reading.call(torch.squeeze, result, axis)
    if index.rank == 1:
        return result
    return reading.call(torch.unflatten, result, axis, tuple(reading.sizes(index.shapes, [index])))


def picked(node: Node, reading: Reading, x: Made, axis: int, positions: Array) -> Made:
    """The positions along an axis; the axes of `positions` take its place."""
    sizes = {s[axis] for s in x.shapes}
    size = min(sizes)
    whole = positions.astype(np.int64)
    if whole.size and (whole.min() < -size or whole.max() >= size):
        raise node.refusal(
            f"positions {whole.min()} to {whole.max()} of {size}", "those there are", "it is not valid"
        )
    if positions.ndim == 0:
        return reading.call(torch.select, x, axis, int(whole))
    if len(sizes) > 1 and (whole < 0).any():
        if (whole >= 0).any():
            raise node.refusal("positions from both ends of an open axis", "from one", "give --input-shape")
        size = -int(whole.min())
        sizes = {size}
        x = reading.call(operator.getitem, x, (*(slice(None),) * axis, slice(-size, None)))
    flat = np.where(whole < 0, whole + size, whole).reshape(-1)
    steps = np.diff(flat)
    if flat.size and (steps == 1).all():
        items = [slice(None)] * axis + [slice(int(flat[0]), int(flat[-1]) + 1)]
        result = x if sizes == {flat.size} else reading.call(operator.getitem, x, tuple(items))
    else:
        result = reading.call(torch.index_select, x, axis, reading.tensor(Known((flat,)), "positions"))
    if positions.ndim == 1:
        return result
    return reading.call(torch.unflatten, result, axis, tuple(positions.shape))


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@reads("Pad")
def read_pad(node: Node, reading: Reading) -> Made:
    """Constant, reflecting, repeating or circular pads."""
    x, pads = reading.tensor(node.input(0)), node.listed("pads", 1)
    mode = node.word("mode", "constant")
    value: Any = node.number("value", 0.0)
    given = node.constant(2, "a value")
    if given is not None and given.array.size == 1:
        value = reading.operand(given, x) if x.rank else 0.0
    axes = node.listed("axes", 3)
    along = [node.along(a, x.rank) for a in axes] if axes is not None else list(range(x.rank))
    if (
        pads is None
        or len(pads) != 2 * len(along)
        or mode not in _PAD_MODES
        or max(map(abs, pads), default=0) > 1 << 16
    ):
        raise node.refusal(f"mode {mode!r} with pads {pads}", "pads of both sides", "it is not valid ONNX")
    amounts = dict.fromkeys(range(x.rank), (0, 0)) | {
        a: (pads[i], pads[i + len(along)]) for i, a in enumerate(along)
    }
    used = [a for a, pair in amounts.items() if any(pair)]
    if not used:
        return x
    if min(used) == 0 and len({s[0] for s in x.shapes}) > 1:
        raise node.refusal("pads beside samples", "none", "the batch is not to be padded")
    flat = [n for a in reversed(range(min(used), x.rank)) for n in amounts[a]]
    if mode == "constant":
        return reading.call(F.pad, x, flat, "constant", value)
    flat += [0, 0] * (max(x.rank - 2, 1) - len(flat) // 2) if x.rank > 2 else []
    return reading.call(F.pad, x, flat, _PAD_MODES[mode])


@reads("Tile")
def read_tile(node: Node, reading: Reading) -> Made:
    """Repeated along its axes."""
    x, counts = reading.tensor(node.input(0)), node.known(1, "repeats")
    if counts is None or any(v.size != x.rank for v in counts.values):
        raise node.refusal("no repeats", "one an axis", "the file is not valid ONNX")
    if all((v == 1).all() for v in counts.values):
        return x
    return reading.method("repeat", x, *reading.sizes([tuple(v.reshape(-1)) for v in counts.values], [x]))


@reads("Trilu")
def read_trilu(node: Node, reading: Reading) -> Made:
    """The upper or lower triangle."""
    x, shift = reading.tensor(node.input(0)), node.listed("k", 1)
    function = torch.triu if node.integer("upper", 1) else torch.tril
    return reading.call(function, x, shift[0] if shift else 0)


# ---- writing


@writes("permute", "transpose", "movedim", "t", "adjoint")
def write_permute(writing: Writing, input: Wire, *dims: Any, **named: Any) -> Any:
    """Transpose, by what the function itself makes of axes that can be told apart."""
    probe = torch.empty([2 + axis for axis in range(input.rank)], device="meta")
    order = [size - 2 for size in writing.again(probe).shape]
    if order == sorted(order):
        return input
    return writing.op("Transpose", input, perm=order)


_STACKS = {"hstack": 1, "column_stack": 1, "vstack": 0, "dstack": 2}


@writes("cat", *_STACKS)
def write_cat(writing: Writing, tensors: Any, dim: int = 0) -> Any:
    """Concat; what has too few axes for a stack is left to torch."""
    rank = writing.result.rank
    if writing.operator in _STACKS:
        dim = _STACKS[writing.operator]
        if any(len(x.shape) != rank for x in tensors) or rank <= max(dim, 1):
            raise NoRow("tensors of too few axes")
    given = [x for x in tensors if tuple(x.shape) != (0,)]
    if len(given) == 1:
        return given[0]
    return writing.op("Concat", *(writing.typed(x, writing.dtype) for x in given), axis=dim % rank)


@writes("stack")
def write_stack(writing: Writing, tensors: Any, dim: int = 0) -> str:
    """Concat along an axis more."""
    axis = dim % writing.result.rank
    at = writing.ints(axis)
    parts = [writing.op("Unsqueeze", writing.typed(x, writing.dtype), at) for x in tensors]
    return writing.op("Concat", *parts, axis=axis)


@writes("pad")
def write_pad(
    writing: Writing, input: Wire, pad: Any = None, mode: str = "constant", value: Any = None,
    padding: Any = None, module: Any = None,
) -> str:  # fmt: skip
    """Pad, amounts as F.pad takes them: the last axis first."""
    amounts = tuple(padding if module is not None else pad)
    if module is not None:
        mode = next((m for kind, m in _PAD_MODULES.items() if isinstance(module, kind)), "constant")
    if not all(isinstance(n, int) for n in amounts):
        raise NoRow("a pad that is open")
    sides = {
        input.rank - 1 - i: (before, after)
        for i, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True))
    }
    return beside(writing, input, sides, mode, value or 0)


_PAD_MODULES: dict[type[nn.Module], str] = {
    nn.modules.padding._ReflectionPadNd: "reflect",
    nn.modules.padding._ReplicationPadNd: "replicate",
    nn.modules.padding._CircularPadNd: "circular",
}


@writes("pixel_shuffle")
def write_pixel_shuffle(writing: Writing, input: Wire, upscale_factor: int) -> str:
    """DepthToSpace in torch's order."""
    _refuse_rank(input)
    return writing.op("DepthToSpace", input, blocksize=upscale_factor, mode="CRD")


@writes("pixel_unshuffle")
def write_pixel_unshuffle(writing: Writing, input: Wire, downscale_factor: int) -> str:
    """By axes: SpaceToDepth has another order."""
    _refuse_rank(input)
    r = downscale_factor
    channels, height, width = input.shape[1:]
    if any(map(is_open, (height, width))):
        raise NoRow("a plane of an open size")
    h, w = cast(int, height) // r, cast(int, width) // r
    name = writing.op("Reshape", input, writing.ints(0, cast(int, channels), h, r, w, r))
    name = writing.op("Transpose", name, perm=[0, 1, 3, 5, 2, 4])
    return writing.op("Reshape", name, writing.ints(0, cast(int, channels) * r * r, h, w))


def _refuse_rank(input: Wire) -> None:
    if input.rank != 4:
        raise NoRow(f"{input.rank} axes")
