"""Windows that slide: their pads, as torch has them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.values import Made
from graphcomp.onnx.rows.wires import NoRow, Wire
from graphcomp.onnx.rows.writing import Writing


@dataclass(frozen=True)
class Window:
    """Kernel, strides and dilations along every spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.kernel)

    @property
    def extents(self) -> tuple[int, ...]:
        """How far a window reaches, dilations counted."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))


_MOST = 1 << 16
"""Of strides, dilations and kernels: nothing may overflow."""


def window_of(node: Node, x: Made, kernel: Sequence[int] | None) -> Window:
    """The window of a node, one to three axes that agree with its input."""
    rank = len(kernel or ())
    if kernel is None or rank not in (1, 2, 3) or x.rank != rank + 2:
        raise node.refusal(
            f"a window of {rank} axes on {x.rank}", "1 to 3 spatial axes", "torch has no such layer"
        )
    ones = (1,) * rank
    strides, dilations = node.integers("strides", ones) or ones, node.integers("dilations", ones) or ones
    numbers = (*kernel, *strides, *dilations)
    if {len(strides), len(dilations)} != {rank} or not all(1 <= n <= _MOST for n in numbers):
        raise node.refusal(
            f"kernel {tuple(kernel)}, strides {strides}, dilations {dilations}",
            f"{rank} positive numbers each",
            "the file is not valid ONNX",
        )
    return Window(tuple(kernel), strides, dilations)


def pads_of(node: Node, x: Made, window: Window) -> tuple[list[int], list[int]]:
    """(before, after) along every spatial axis, from `pads` and `auto_pad`."""
    rank = window.rank
    pads = node.integers("pads", (0,) * 2 * rank) or (0,) * 2 * rank
    auto = node.word("auto_pad", "NOTSET")
    if len(pads) != 2 * rank or not all(0 <= n <= _MOST for n in pads):
        raise node.refusal(f"pads {list(pads)}", f"{2 * rank} numbers", "the file is not valid ONNX")
    if auto in ("NOTSET", ""):
        return list(pads[:rank]), list(pads[rank:])
    if auto == "VALID":
        return [0] * rank, [0] * rank
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        raise node.refusal(f"auto_pad={auto!r}", "SAME_UPPER or SAME_LOWER", "the file is not valid ONNX")
    totals = {
        tuple(
            max((-(-size // s) - 1) * s + reach - size, 0)
            for size, s, reach in zip(shape[2:], window.strides, window.extents, strict=True)
        )
        for shape in x.shapes
    }
    if len(totals) != 1:
        raise node.refusal(f"{auto} pads that depend on the size", "a fixed size", "give --input-shape")
    (total,) = totals
    less, more = [n // 2 for n in total], [n - n // 2 for n in total]
    return (less, more) if auto == "SAME_UPPER" else (more, less)


def padded(reading: Reading, x: Made, before: Sequence[int], after: Sequence[int], value: float) -> Made:
    """The input with pads on the last axes; itself without any."""
    flat: list[Any] = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return reading.call(F.pad, x, flat, "constant", value) if any(flat) else x


_MODES = {"constant": "constant", "zeros": "constant", "reflect": "reflect", "replicate": "edge"}


def beside(
    writing: Writing, x: Wire, sides: Mapping[int, tuple[int, int]], mode: str, value: Any = 0.0
) -> str:
    """Write a Pad, in modes of torch.

    Args:
        sides: axis -> how much comes before and after; negative amounts cut away.
        value: of a constant pad.
    """
    sides = {axis: pair for axis, pair in sides.items() if any(pair)}
    if not sides:
        return x.name
    if mode == "circular":  # ONNX has it from opset 19 on
        name = x.name
        for axis, (before, after) in sides.items():
            size = x.shape[axis]
            if not isinstance(size, int):
                raise NoRow("a circular pad of an open size")
            index = torch.arange(-before, size + after) % size
            name = writing.op("Gather", name, index, axis=axis)
        return name
    if mode not in _MODES:
        raise NoRow(f"padding mode {mode!r}")
    amounts = [sides.get(axis, (0, 0))[end] for end in (0, 1) for axis in range(x.rank)]
    fill = writing.number(value, x.dtype) if mode in ("constant", "zeros") and value else None
    return writing.op("Pad", x, writing.ints(*amounts), fill, mode=_MODES[mode])
