"""Pads of windows that slide: `auto_pad` and pads of two sides, as torch has them."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.values import Made


def pads_of(
    node: Node, x: Made, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(before, after) of every spatial axis, from `pads` and `auto_pad`."""
    rank = len(kernel)
    pads = node.integers("pads", (0,) * 2 * rank) or ()
    auto = node.word("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        if len(pads) != 2 * rank:
            raise node.refusal(f"pads={list(pads)}", f"{2 * rank} numbers", "the file is not valid ONNX")
        return ([0] * rank, [0] * rank) if auto == "VALID" else (list(pads[:rank]), list(pads[rank:]))
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        raise node.refusal(f"auto_pad={auto!r}", "SAME_UPPER or SAME_LOWER", "the file is not valid ONNX")
    sizes = {shape[2:] for shape in x.shapes}
    if len(sizes) != 1:
        raise node.refusal("SAME pads of an open size", "a fixed size", "give --input-shape")
    before, after = [], []
    for size, k, s, d in zip(*sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        less, more = total // 2, total - total // 2
        before.append(less if auto == "SAME_UPPER" else more)
        after.append(more if auto == "SAME_UPPER" else less)
    return before, after


def padded(reading: Reading, x: Made, before: Sequence[int], after: Sequence[int], value: float) -> Made:
    """The input with pads on the last axes; itself without any."""
    flat: list[Any] = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    if not any(flat):
        return x
    return reading.call(F.pad, x, flat, "constant", value)
