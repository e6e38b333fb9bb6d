"""The sizes that a program is written for, and what its nodes yield for each of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.errors import TraceError
from graphcomp.ir import Program, run_on_meta
from graphcomp.onnx.rows.wires import NoRow
from graphcomp.onnx.sizes import OpenAxes, open_names, steps

_BATCHES = (7, 11)
"""Two that no literal of a network equals by chance in the same way."""


@dataclass(frozen=True, eq=False)
class Settings:
    """What the nodes of a program yield in every setting.

    Attributes:
        values: node -> meta tensors and numbers; one dictionary a setting.
        open: sizes of an open axis in every setting -> what it is called.
    """

    values: tuple[dict[fx.Node, Any], ...]
    open: Mapping[tuple[int, ...], str]


def settings_of(program: Program, open_axes: OpenAxes, batch: int = 1) -> Settings:
    """Run a program without numbers on two sizes of every open axis, or once if none is open.

    Args:
        program: whose example inputs say how large other axes are.
        open_axes: axes of one name have one size.
        batch: where the first axis is not open.

    Raises:
        NoRow: if it does not run at other sizes.
    """
    names = list(dict.fromkeys(name for axes in open_axes for name in axes.values()))
    if not names and batch == 1:
        return Settings((program.values,), {})
    larger = steps(open_names(open_axes))
    found, seen = [], dict[tuple[int, ...], str]()
    chosen: list[dict[str, int]] = [{}, {}] if names else [{}]
    for name in names:
        axis, example = next(
            (axis, x) for x, axes in zip(program.example_inputs, open_axes, strict=True)
            for axis, other in axes.items() if other == name
        )  # fmt: skip
        size = example.shape[axis]
        pair = _BATCHES if axis == 0 else (size, size + larger[name])
        chosen[0][name], chosen[1][name] = pair
        seen[pair] = name
    for sizes in chosen:
        inputs = tuple(
            _sized(x, {0: batch} | {axis: sizes[name] for axis, name in axes.items()})
            for x, axes in zip(program.example_inputs, open_axes, strict=True)
        )
        try:
            found.append(run_on_meta(Program(program.module, inputs)))
        except TraceError as error:
            raise NoRow(f"other sizes of its inputs ({error})") from error
    return Settings(tuple(found), seen)


def _sized(example: Tensor, sizes: Mapping[int, int]) -> Tensor:
    shape = [sizes.get(axis, size) for axis, size in enumerate(example.shape)]
    return torch.empty(shape, dtype=example.dtype, device="meta")
