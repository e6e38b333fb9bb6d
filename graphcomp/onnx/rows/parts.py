"""Rows that take parts of tensors: indices, slices, pieces."""

from types import EllipsisType
from typing import Any, cast

import torch
from torch import Tensor

from graphcomp.onnx.rows.registry import writes
from graphcomp.onnx.rows.wires import LARGEST, NoRow, Wire, is_open
from graphcomp.onnx.rows.writing import Writing

# ---- writing


@writes("getattr")
def write_getattr(writing: Writing, input: Any, name: str) -> Any:
    """A part of several results, or the transpose."""
    if isinstance(input, tuple) and name in ("values", "indices"):
        return input[name == "indices"]
    if isinstance(input, Wire) and name in ("T", "mT"):
        axes = list(range(input.rank))
        order = axes[::-1] if name == "T" else [*axes[:-2], axes[-1], axes[-2]]
        return writing.op("Transpose", input, perm=order)
    if isinstance(input, Wire) and name == "data":
        return input
    raise NoRow(f"the attribute {name}")


@writes("getitem")
def write_getitem(writing: Writing, input: Any, index: Any) -> Any:
    """A part of several values; of a tensor slices first, then what is picked, then axes more or less."""
    if not isinstance(input, Wire):
        return input[index]
    parts = index if isinstance(index, tuple) else (index,)
    spans: dict[int, slice] = {}
    picked: dict[int, Any] = {}
    gone, new, axis, made = list[int](), list[int](), 0, 0
    count = sum(1 for p in parts if p is not None and not isinstance(p, EllipsisType))
    for part in parts:
        if part is None:
            new.append(made)
            made += 1
        elif isinstance(part, EllipsisType):
            more = input.rank - count
            axis, made = axis + more, made + more
        elif isinstance(part, bool):
            raise NoRow("an index of truth values")
        else:
            if isinstance(part, slice):
                spans[axis] = part
                made += 1
            elif isinstance(part, int):
                picked[axis] = part
                gone.append(axis)
            elif isinstance(part, list) or _is_vector(part):
                picked[axis] = torch.tensor(part) if isinstance(part, list) else part
                made += 1
            else:
                raise NoRow(f"an index of {type(part).__name__}")
            axis += 1
    several = [a for a, p in picked.items() if not isinstance(p, int)]
    if len(several) > 1 or several and gone:
        raise NoRow("an index of several tensors")
    name = _sliced(writing, input, spans)
    for at in sorted(picked, reverse=True):
        name = _picked(writing, name, picked[at], at)
    return writing.op("Unsqueeze", name, writing.ints(*new)) if new else name


def _is_vector(part: Any) -> bool:
    if isinstance(part, Tensor) and part.dtype is not torch.bool:
        return part.ndim == 1
    return isinstance(part, Wire) and part.rank == 1 and part.dtype in (torch.int32, torch.int64)


def _picked(writing: Writing, value: Any, index: Any, axis: int) -> str:
    """Gather; by one number it takes the axis away."""
    if isinstance(index, int):
        return writing.op("Gather", value, writing.store(torch.tensor(index)), axis=axis)
    return writing.op("Gather", value, index.long() if isinstance(index, Tensor) else index, axis=axis)


def _sliced(writing: Writing, x: Wire, spans: dict[int, slice]) -> str:
    """One Slice on all axes that are cut."""
    cut = {axis: s for axis, s in spans.items() if not _is_whole(x, axis, s)}
    if not cut:
        return x.name
    if any(not isinstance(s.step, int | None) or (s.step or 1) < 1 for s in cut.values()):
        raise NoRow("a step that is open")
    starts = [0 if s.start is None else s.start for s in cut.values()]
    ends = [LARGEST if s.stop is None else s.stop for s in cut.values()]
    steps = [s.step or 1 for s in cut.values()]
    by = None if set(steps) == {1} else writing.ints(*steps)
    return writing.op("Slice", x, writing.sizes(starts), writing.sizes(ends), writing.ints(*cut), by)


def _is_whole(x: Wire, axis: int, span: slice) -> bool:
    size, stop = x.shape[axis], span.stop
    if span.start not in (None, 0) or span.step not in (None, 1):
        return False
    if is_open(size):
        return stop is None or is_open(stop) and stop.values == size.values
    return stop is None or not is_open(stop) and stop >= size


@writes("narrow")
def write_narrow(writing: Writing, input: Wire, dim: int, start: Any, length: Any) -> str:
    """A slice."""
    if is_open(start) or is_open(length):
        raise NoRow("a part of an open size")
    return _sliced(writing, input, {input.axis(dim): slice(start, start + length)})


@writes("select")
def write_select(writing: Writing, input: Wire, dim: int, index: Any) -> str:
    """One of an axis."""
    if not isinstance(index, int):
        raise NoRow("an open index")
    return _picked(writing, input, index, input.axis(dim))


@writes("index_select")
def write_index_select(writing: Writing, input: Wire, dim: int, index: Any) -> str:
    """Some of an axis."""
    return _picked(writing, input, index, input.axis(dim))


@writes("gather")
def write_gather(writing: Writing, input: Wire, dim: int, index: Any, sparse_grad: bool = False) -> str:
    """GatherElements."""
    return writing.op("GatherElements", input, index, axis=input.axis(dim))


@writes("one_hot")
def write_one_hot(writing: Writing, input: Wire, num_classes: Any = -1) -> str:
    """OneHot."""
    if not isinstance(num_classes, int) or num_classes < 1:
        raise NoRow("a number of classes that follows from the data")
    return writing.op("OneHot", input, writing.ints(num_classes), writing.ints(0, 1), axis=-1)


@writes("Embedding", "embedding")
def write_embedding(
    writing: Writing,
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> str:
    """Rows of a table."""
    if max_norm is not None:
        raise NoRow("max_norm, which changes the table")
    return writing.op("Gather", weight, input, axis=0)


@writes("chunk", "split", "tensor_split", "unbind", "split_with_sizes")
def write_split(writing: Writing, input: Wire, *given: Any, **named: Any) -> Any:
    """Split into the sizes that are known to come out; single ones are picked."""
    parts = writing.parts
    removed = parts[0].rank < input.rank
    at = 0 if writing.operator == "unbind" else 1
    axis = input.axis(named.get("dim", given[at] if len(given) > at else 0))
    sizes = [1] * len(parts) if removed else [part.shapes[0][axis] for part in parts]
    if not removed and any(is_open(part.shape[axis]) for part in parts):
        if writing.operator != "chunk":
            raise NoRow("parts of an open size")
        # equal parts, and a smaller last one: both mean the same by a number of parts
        return writing.several("Split", len(parts), input, axis=axis, num_outputs=len(parts))
    if len(parts) == 1 and not removed:
        return (input,)
    names = writing.several("Split", len(parts), input, writing.ints(*sizes), axis=axis)
    return tuple(writing.op("Squeeze", n, writing.ints(axis)) for n in names) if removed else names


@writes("roll")
def write_roll(writing: Writing, input: Wire, shifts: Any, dims: Any = None) -> Any:
    """What goes out at one end comes in at the other: two slices, joined."""
    if dims is None:
        raise NoRow("a roll of the flattened tensor")
    all_shifts = shifts if isinstance(shifts, tuple | list) else (shifts,)
    value: Any = input
    for shift, dim in zip(all_shifts, dims if isinstance(dims, tuple | list) else (dims,), strict=True):
        axis = input.axis(dim)
        size = input.shape[axis]
        if is_open(size) or is_open(shift):
            raise NoRow("a roll of an open size")
        if shift % size == 0:
            continue
        cut = size - shift % size
        parts = writing.several("Split", 2, value, writing.ints(cut, size - cut), axis=axis)
        value = writing.op("Concat", parts[1], parts[0], axis=axis)
    return value


@writes("flip")
def write_flip(writing: Writing, input: Wire, *dims: Any) -> str:
    """Slices that count backwards."""
    axes = [input.axis(d) for one in dims for d in (one if isinstance(one, tuple | list) else (one,))]
    if not axes:
        return input.name
    ints = writing.ints
    first, last = ints(*[-1] * len(axes)), ints(*[-LARGEST] * len(axes))
    return writing.op("Slice", input, first, last, ints(*axes), first)


@writes("repeat_interleave")
def write_repeat_interleave(writing: Writing, input: Wire, repeats: Any, dim: Any = None) -> str:
    """Every one several times."""
    if dim is None or not isinstance(repeats, int) or is_open(input.shape[input.axis(dim)]):
        raise NoRow("repeats of an open size, or of the flattened tensor")
    axis = input.axis(dim)
    return _picked(writing, input, torch.arange(input.shapes[0][axis]).repeat_interleave(repeats), axis)


@writes("channel_shuffle")
def write_channel_shuffle(writing: Writing, input: Wire, groups: int) -> str:
    """By axes."""
    channels = cast(int, input.shape[1])
    rest = input.shape[2:]
    if sum(map(is_open, rest)) > 0:
        index = torch.arange(channels).reshape(groups, -1).t().reshape(-1)
        return _picked(writing, input, index, 1)
    sizes = [cast(int, n) for n in rest]
    name = writing.op("Reshape", input, writing.ints(0, groups, channels // groups, *sizes))
    name = writing.op("Transpose", name, perm=[0, 2, 1, *range(3, input.rank + 1)])
    return writing.op("Reshape", name, writing.ints(0, channels, *sizes))
