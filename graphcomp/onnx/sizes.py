"""Which axes of a file's inputs are of any size, and the sizes at which it is compared with its program."""

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, fx

from graphcomp.errors import ExportError
from graphcomp.ir import Program, op_name

Dynamic = Literal["batch", "height", "width"]

OpenAxes = tuple[Mapping[int, str], ...]
"""For every input its axes of any size -> what the file calls the size; equal names are equal sizes."""

STEP = 32
"""Most networks halve their maps at most five times: other sizes differ by a multiple of this."""

ODD = 7
"""But for one that differs by this."""


def open_axes(program: Program, dynamic: Sequence[Dynamic] | None) -> OpenAxes:
    """The axes that are left open.

    Args:
        program: what its file left open stays so, unless `dynamic` says otherwise.
        dynamic: what to leave open; None: what the file did, the batch of a network that has none. Height and
            width are the last two axes of inputs of four and more dimensions; of those that are only read
            with their channels moved from the end to the front (NHWC), the two before these.

    Raises:
        ExportError: height or width of a network that takes no images, or of a program that was specialised
            to its example's.
    """
    axes = _axes(program, dynamic)
    if program.interface.specialised and is_open(axes, batch=False):
        raise ExportError(
            "dynamic: found height or width for a network that is for its example's only (specialised by "
            f"{program.interface.specialised[0]}), expected none; leave them out"
        )
    return axes


def _axes(program: Program, dynamic: Sequence[Dynamic] | None) -> OpenAxes:
    ports = program.interface.inputs
    if dynamic is None and ports:
        return tuple(dict(port.axes) for port in ports)
    wanted = ("batch",) if dynamic is None else tuple(dynamic)
    places = [_places(program, node) for node in _inputs(program)]
    found = tuple({axis: name for name, axis in place.items() if name in wanted} for place in places)
    missing = [name for name in wanted if not any(name in axes.values() for axes in found)]
    if missing:
        raise ExportError(
            f"dynamic: found {missing[0]} for inputs of {[x.dim() for x in program.example_inputs]} "
            "dimensions, expected an image to have one; leave it out"
        )
    named = [port.axes for port in ports] or [{} for _ in found]
    return tuple(
        {axis: own.get(axis, name) for axis, name in axes.items()}
        for axes, own in zip(found, named, strict=True)
    )


def _inputs(program: Program) -> list[fx.Node]:
    nodes = [n for n in program.graph.nodes if n.op == "placeholder"]
    return nodes[: len(program.example_inputs)]


def _places(program: Program, node: fx.Node) -> dict[Dynamic, int]:
    rank = cast(Tensor, program.values[node]).dim()
    if rank == 0:
        return {}
    if rank < 4:
        return {"batch": 0}
    last = rank - 1 - _is_channels_last(program, node, rank)
    return {"batch": 0, "height": last - 1, "width": last}


def _is_channels_last(program: Program, node: fx.Node, rank: int) -> bool:
    moved = (0, rank - 1, *range(1, rank - 1))
    return bool(node.users) and all(
        op_name(program, user) == "permute" and _order(user) == moved for user in node.users
    )


def _order(node: fx.Node) -> tuple[int, ...]:
    given = node.args[1:] or tuple(node.kwargs.values())
    flat = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
    return tuple(cast(Sequence[int], flat))


def is_open(axes: OpenAxes, batch: bool) -> bool:
    """Whether any first axis is open (`batch`), or any other one."""
    return any((axis == 0) == batch for own in axes for axis in own)


def other_sizes(program: Program, axes: OpenAxes) -> list[tuple[Tensor, ...]]:
    """Example inputs of two other sizes of the axes that are open beside the batch; none if none is.

    One is larger, by another step for every axis; one differs in every second axis only, and is smaller there
    if that leaves two thirds.
    """
    names = open_names(axes)
    if not names:
        return []
    mixed = {name: -STEP if index % 2 == 0 else 0 for index, name in enumerate(names)}
    return [_all_resized(program, axes, steps(names)), _all_resized(program, axes, mixed)]


def steps(names: Sequence[str]) -> dict[str, int]:
    """How much larger each is at the first other size: by another step each."""
    return {name: STEP * (1 + index) for index, name in enumerate(names)}


def odd_sizes(program: Program, axes: OpenAxes) -> list[tuple[Tensor, ...]]:
    """The same at a size that no network is made for, where parts of sizes are rounded; not all run there."""
    odd = {name: ODD + 4 * index for index, name in enumerate(open_names(axes))}
    return [_all_resized(program, axes, odd)] if odd else []


def open_names(axes: OpenAxes) -> list[str]:
    """What the axes beside the batch are called whose size is open."""
    return list(dict.fromkeys(name for own in axes for axis, name in own.items() if axis))


def _all_resized(program: Program, axes: OpenAxes, step: Mapping[str, int]) -> tuple[Tensor, ...]:
    return tuple(
        _resized(x, {axis: step[name] for axis, name in own.items() if axis})
        for x, own in zip(program.example_inputs, axes, strict=True)
    )


def _resized(x: Tensor, steps: Mapping[int, int]) -> Tensor:
    shape = list(x.shape)
    for axis, step in steps.items():
        shape[axis] += step if step >= 0 or shape[axis] >= 3 * STEP else 2 * STEP
    return torch.zeros(shape, dtype=x.dtype)
