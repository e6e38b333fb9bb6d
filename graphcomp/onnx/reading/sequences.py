"""Lists of tensors in a file: what exporters write for `split` and `cat` where they do not unfold them.

A list has no node in the program; its items have.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from graphcomp.onnx.rows import Known, Made, Node, Reading, Value

Items = tuple[Value, ...]


def _split(node: Node, reading: Reading, lists: Sequence[Items | None]) -> Items:
    """Pieces of one size, of given sizes, or of one element each, whose axis may go."""
    x, sizes = reading.tensor(node.input(0)), node.constant(1, "sizes of pieces")
    axis, keepdims = node.axis("axis", 0, x.rank), node.integer("keepdims", 1)
    lengths = {s[axis] for s in x.shapes}
    if len(lengths) != 1:
        raise node.refusal("an axis of an open size", "a fixed size", "samples cannot be split")
    (length,) = lengths
    if sizes is None:
        items = [reading.call(torch.narrow, x, axis, i, 1) for i in range(_few(node, length))]
        return tuple(i if keepdims else reading.call(torch.squeeze, i, axis) for i in items)
    if sizes.array.ndim == 0:
        each = int(sizes.array)
        if each < 1:
            raise node.refusal(f"pieces of {each}", "at least 1", "the file is not valid ONNX")
        _few(node, -(-length // each))
        given = [min(each, length - start) for start in range(0, length, each)]
    else:
        given = [int(n) for n in sizes.array.reshape(-1)]
    if sum(given) != length or min(given, default=0) < 0:
        raise node.refusal(f"pieces {given}", f"{length} together", "the file is not valid ONNX")
    return reading.parts(reading.call(torch.split, x, given, axis))


_MOST = 1 << 14


def _few(node: Node, count: int) -> int:
    if count > _MOST:
        raise node.refusal(f"{count} pieces", f"at most {_MOST}", "this is no network")
    return count


def _at(node: Node, reading: Reading, lists: Sequence[Items | None]) -> Value:
    """One of them."""
    items, index = _list(node, lists), node.constant(1, "a position")
    at = len(items) if index is None else int(index.array.reshape(()))
    if not -len(items) <= at < len(items):
        raise node.refusal(f"item {at} of {len(items)}", "one that is there", "the file is not valid ONNX")
    return items[at]


def _joined(node: Node, reading: Reading, lists: Sequence[Items | None]) -> Made:
    """`cat`, or `stack` along a new axis."""
    tensors = [reading.tensor(v) for v in _list(node, lists)]
    if not tensors:
        raise node.refusal("an empty list", "tensors", "the file is not valid ONNX")
    new = node.integer("new_axis", 0)
    axis = node.axis("axis", 0, tensors[0].rank + bool(new))
    return reading.call(torch.stack if new else torch.cat, tensors, axis)


def _length(node: Node, reading: Reading, lists: Sequence[Items | None]) -> Known:
    return Known((np.array(len(_list(node, lists)), np.int64),) * len(reading.batches))


def _list(node: Node, lists: Sequence[Items | None]) -> Items:
    items = next(iter(lists), None)
    if items is None:
        raise node.refusal("a tensor", "a list of tensors", "the file is not valid ONNX")
    return items


MAKE: dict[str, Callable[[Node, Reading, Sequence[Items | None]], Items]] = {
    "SplitToSequence": _split,
    "SequenceConstruct": lambda node, reading, lists: tuple(node.all_inputs()),
}
"""Operators that yield a list. They take what a read row takes, and the lists among their inputs."""

TAKE: dict[str, Callable[[Node, Reading, Sequence[Items | None]], Value]] = {
    "SequenceAt": _at,
    "ConcatFromSequence": _joined,
    "SequenceLength": _length,
}
"""Operators that take a list as their first input."""
