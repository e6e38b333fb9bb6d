"""What readers lose with removed channels that hold a constant: it goes into their biases."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from graphcomp.channels.constants import (
    SAME,
    Known,
    along_channels,
    constants,
    in_one_shape,
    is_uniform,
    per_output,
)
from graphcomp.channels.labels import Marks
from graphcomp.channels.model import ELEMENTS, Axis, Channels
from graphcomp.ir import Program, with_tensors


@dataclass(frozen=True, eq=False)
class Shift:
    """What the outputs of a reader lose when constants that it reads become zeros.

    Attributes:
        layer: module path.
        amount: to be added to its bias; float64, one a row of its output.
        exact: whether every position loses just that.
        channels: how many of its inputs are constants that go.
    """

    layer: str
    amount: Tensor
    exact: bool
    channels: int


def shifts(channels: Channels, gone: Marks) -> list[Shift]:
    """For every layer that reads removed channels which hold constants what belongs into its bias.

    A layer whose calls lose different constants gets nothing: it has one bias, and reads zeros.

    Args:
        channels: the analysis of the program as it is.
        gone: which channels go, one bool a channel id.
    """
    if not any(_has_dead_rows(channels, axis, gone[axis.channels]) for axis in channels.axes):
        return []
    program, known = channels.program, constants(channels.program)
    columns = {
        id(program.tensors[axis.weight]): torch.from_numpy(gone[axis.channels])
        for axis in channels.axes
        if axis.reads and gone[axis.channels].any()
    }
    calls: dict[int, list[Shift]] = {}
    for node in program.graph.nodes:
        layer = program.modules.get(str(node.target)) if node.op == "call_module" else None
        weight = getattr(layer, "weight", None)
        if layer is not None and id(weight) in columns:
            bias = getattr(layer, "bias", None)
            found = _shift(program, node, known[node.all_input_nodes[0]], columns[id(weight)])
            calls.setdefault(id(layer if bias is None else bias), []).append(found)
    return [s for found in calls.values() for s in _agreed(found)]


def _agreed(found: Sequence[Shift]) -> list[Shift]:
    """One a layer, if all calls that share a bias lose the same."""
    first = found[0]
    if not first.amount.any() or any(not torch.allclose(first.amount, s.amount) for s in found[1:]):
        return []
    exact = all(s.exact for s in found)
    return [
        Shift(name, first.amount, exact, first.channels) for name in dict.fromkeys(s.layer for s in found)
    ]


def _shift(program: Program, node: fx.Node, x: Known, gone: Tensor) -> Shift:
    layer = with_tensors(program.layer(cast(str, node.target)), lambda t: t.detach().double()).eval()
    shape = program.shape(node.all_input_nodes[0]) or ()
    if isinstance(layer, nn.Linear):
        shape = (*shape[-1:],)  # (features,): every position of the other axes reads the same
        x = _last_axis(x, shape[0])
    else:
        x = along_channels(x, layer, shape)
    lost = torch.where(gone & x.sure, x.value, 0.0)
    layer._parameters["bias"] = None
    count = int((lost != 0).sum())
    rows = cast(Tensor, layer.weight)
    if not count:
        width = rows.shape[0] if isinstance(layer, nn.Linear) else cast(int, layer.out_channels)
        return Shift(str(node.target), torch.zeros(width, dtype=torch.float64), True, 0)
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            return Shift(str(node.target), layer(lost), True, count)
        convolution = cast(nn.Conv2d, layer)
        if is_uniform(convolution):
            taps = per_output(convolution).sum(-1)
            amount = (taps * lost.reshape(convolution.groups, 1, -1)).sum(-1).flatten()
            return Shift(str(node.target), amount, True, count)
        plane = shape[len(shape) - (rows.ndim - 2) :]
        out = layer(lost.reshape(1, -1, *[1] * len(plane)).expand(1, -1, *plane)).flatten(2)[0]
    amount = out.mean(1)
    error = float((out - amount[:, None]).abs().max())
    return Shift(str(node.target), amount, error <= SAME * float(out.abs().max()), count)


def _last_axis(x: Known, width: int) -> Known:
    value, sure = (t.expand(*t.shape[:-1], width).reshape(-1, width) for t in in_one_shape(x))
    certain = sure.all(0) & (value == value[:1]).all(0)
    return Known(torch.where(certain, value[0], 0.0), certain)


def _has_dead_rows(channels: Channels, axis: Axis, gone: Marks) -> bool:
    """Whether some channel that goes has only zeros on a weight that makes it: nothing else is a constant."""
    if axis.reads or not gone.any():
        return False
    if axis.role == "out":
        (name, dim), *_ = axis.tensors
        tensor = channels.program.tensors[name].detach()
        blocks = tensor.reshape(axis.groups, -1, *tensor.shape[1:]).movedim(dim + 1, 1)
        rows = [blocks.flatten(2).flatten(0, 1)]
    else:
        held = [(channels.program.tensors[n].detach(), d) for n, d in axis.tensors if n.endswith("weight")]
        rows = [
            t.reshape(-1, 1) if d == ELEMENTS else t.movedim(d, 0).reshape(t.size(d), -1) for t, d in held
        ]
    return any(_has_zero_row(t, torch.from_numpy(gone.ravel())) for t in rows)


def _has_zero_row(matrix: Tensor, among: Tensor) -> bool:
    suspects = among & (matrix[:, 0] == 0)  # few: no matrix is gone through for them
    return bool(suspects.any()) and not bool(matrix[suspects].any(1).all())
