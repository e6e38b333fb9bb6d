"""The sizes that a program is written for, and what its nodes yield for each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.errors import TraceError
from graphcomp.ir import Program, run_on_meta
from graphcomp.onnx.rows.wires import NoRow

OpenAxes = Sequence[Mapping[int, str]]
"""For every input the axes that are left open -> what they are called in the file."""

_BATCHES = (7, 11)
"""Two that no literal of a network equals by chance in the same way."""

_FACTORS = (2, 3, 5)
"""How much longer than in the example further open axes are in the second setting, each another factor."""


@dataclass(frozen=True, eq=False)
class Settings:
    """What the nodes of a program yield in every setting.

    Attributes:
        values: node -> meta tensors and numbers; one dictionary a setting.
        open: sizes of an open axis in every setting -> what it is called.
    """

    values: tuple[dict[fx.Node, Any], ...]
    open: Mapping[tuple[int, ...], str]


def settings_of(program: Program, open_axes: OpenAxes) -> Settings:
    """Run a program without numbers on two sizes of every open axis, or once if none is open.

    Raises:
        NoRow: if it does not run at other sizes.
    """
    names = list(dict.fromkeys(name for axes in open_axes for name in axes.values()))
    if not names:
        return Settings((program.values,), {})
    found, seen = [], dict[tuple[int, ...], str]()
    chosen: list[dict[str, int]] = [{}, {}]
    for name in names:
        axis, example = next(
            (axis, x) for x, axes in zip(program.example_inputs, open_axes, strict=True)
            for axis, other in axes.items() if other == name
        )  # fmt: skip
        size = example.shape[axis]
        pair = _BATCHES if axis == 0 else (size, size * _FACTORS[len(seen) % len(_FACTORS)])
        chosen[0][name], chosen[1][name] = pair
        seen[pair] = name
    for sizes in chosen:
        inputs = tuple(
            _sized(x, {axis: sizes[name] for axis, name in axes.items()})
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
