"""Operators that only move data: they run on whatever stands for it, labels or numbers of positions."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphcomp.channels.labels import concatenate
from graphcomp.ir import CASTS, Program, Unknown, op_name, values_of


@dataclass(frozen=True)
class Padding:
    """What a padding operator does, in the arguments of F.pad."""

    flat: tuple[int, ...]
    mode: str
    value: float | None
    computed: bool = False
    """Whether amounts follow from sizes; `flat` has those at the example's."""

    def amounts(self, ndim: int) -> dict[int, tuple[int, int]]:
        """Axis -> (before, after), of the axes that are padded."""
        pairs = zip(self.flat[::2], self.flat[1::2], strict=True)
        return {ndim - 1 - i: pair for i, pair in enumerate(pairs) if any(pair)}

    def __call__(self, x: Tensor) -> Tensor:
        """Pad numbers of positions; 0 beside them, or what the mode repeats."""
        for d, (before, after) in self.amounts(x.ndim).items():
            numbers = torch.arange(1.0, x.size(d) + 1, dtype=torch.float64).reshape(1, 1, -1)
            index = F.pad(numbers, (before, after), self.mode).long().flatten()
            shape = [len(index) if i == d else 1 for i in range(x.ndim)]
            x = x.index_select(d, (index - 1).clamp(min=0)) * (index > 0).reshape(shape)
        return x


def padding_of(program: Program, node: fx.Node) -> Padding | None:
    """The padding that a node applies; None if its amounts are computed from what is no size."""
    if node.op == "call_module":
        module = program.layer(cast(str, node.target))
        mode = next((m for kind, m in _PAD_MODES.items() if isinstance(module, kind)), "constant")
        return Padding(tuple(module.padding), mode, getattr(module, "value", None))  # type: ignore[arg-type]
    given = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
    raw = given["pad"]
    raw = tuple(raw) if isinstance(raw, tuple | list) else (raw,)
    flat = tuple(program.values[a] if isinstance(a, fx.Node) else a for a in raw)
    if not all(isinstance(a, int) for a in flat):
        return None
    computed = any(isinstance(a, fx.Node) for a in raw)
    return Padding(flat, given.get("mode", "constant"), given.get("value"), computed)  # type: ignore[arg-type]


_PAD_MODES: dict[type[nn.Module], str] = {
    nn.modules.padding._ReflectionPadNd: "reflect",
    nn.modules.padding._ReplicationPadNd: "replicate",
    nn.modules.padding._CircularPadNd: "circular",
}


class NotMovable(Exception):  # noqa: N818 - a signal inside this module, not an error
    """The operands of a data movement operator are not of a kind that can be followed."""


def move(
    program: Program, node: fx.Node, tensor: Callable[[fx.Node], Tensor], number: Callable[[fx.Node], Any]
) -> Any:
    """Run a data movement node on tensors of one's own (labels, positions).

    Args:
        program: the program that the node is in; its integer and boolean buffers serve as indices.
        node: a node for which `is_move` is true.
        tensor, number: what its argument nodes yield.
    """

    name = op_name(program, node)

    def load(source: fx.Node) -> Any:
        value = program.values[source]
        if not holds_tensor(value):
            return number(source)
        if not isinstance(value, Tensor):
            return tensor(source)
        if (
            not value.dtype.is_floating_point
            and source is not node.args[0]
            and op_name(program, node) in INDEXERS
        ):
            return _index(program, source)
        return tensor(source)

    args, kwargs = fx.node.map_arg(node.args, load), fx.node.map_arg(node.kwargs, load)
    if name == "pad":
        padding = padding_of(program, node)
        if padding is None:
            raise NotMovable
        return padding(cast(Tensor, args[0]))
    if node.op == "call_module":
        return MODULE_MOVES[name](program.layer(cast(str, node.target)), *args, **kwargs)
    if any(isinstance(a, torch.dtype) for a in args) and name == "view":
        raise NotMovable
    return MOVES[name](*args, **kwargs)


def _index(program: Program, source: fx.Node) -> Tensor:
    """An index that is held, or that follows from sizes: positions that are compared, as in MViT.

    One that other heights and widths change is known where the program takes no others.
    """
    if source.op == "get_attr":
        return program.tensors[cast(str, source.target)]
    values = values_of(program)
    try:
        found = [values.of(source, batch) for batch in (1, 2)]
        if not program.interface.specialised:
            found.append(values.of(source, grown=True))
    except Unknown as error:
        raise NotMovable from error
    if any(x.is_meta or not torch.equal(x, found[0]) for x in found):
        raise NotMovable
    return cast(Tensor, found[0])


INDEXERS = {"getitem", "index_select"}


def _concatenate(tensors: Sequence[Tensor], dim: int = 0, axis: int | None = None) -> Tensor:
    return concatenate(list(tensors), dim if axis is None else axis)


def _concatenation(axis: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """hstack and its like: a concatenation along a fixed axis, for tensors that have more axes."""

    def concatenated(tensors: Sequence[Tensor]) -> Tensor:
        if min(t.ndim for t in tensors) <= max(axis, 1):
            raise NotMovable
        return concatenate(list(tensors), axis)

    return concatenated


def concatenated_axis(program: Program, node: fx.Node) -> int | None:
    """The axis that operands are concatenated along; None if the node does something else, or computes it."""
    if node.op != "call_function":
        return None
    name = op_name(program, node)
    if name != "cat":
        return _STACKS.get(name)
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return given if isinstance(given, int) else None


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, *rest = x.shape
    return x.reshape(b, groups, c // groups, *rest).transpose(1, 2).reshape(b, c, *rest)


_STACKS = {"hstack": 1, "column_stack": 1, "vstack": 0, "dstack": 2}


CONCATENATIONS = ("cat", *_STACKS)


MOVES: dict[str, Callable[..., Any]] = {
    "view": torch.Tensor.reshape,
    "reshape": torch.Tensor.reshape,
    "flatten": torch.flatten,
    "unflatten": torch.unflatten,
    "permute": torch.Tensor.permute,
    "transpose": torch.transpose,
    "movedim": torch.movedim,
    "t": torch.t,
    "squeeze": torch.squeeze,
    "unsqueeze": torch.unsqueeze,
    "expand": torch.Tensor.expand,
    "broadcast_to": torch.broadcast_to,
    "repeat": torch.Tensor.repeat,
    "tile": torch.tile,
    "roll": torch.roll,
    "flip": torch.Tensor.flip,
    "repeat_interleave": torch.repeat_interleave,
    "chunk": torch.chunk,
    "split": torch.split,
    "tensor_split": torch.tensor_split,
    "unbind": torch.unbind,
    "narrow": torch.narrow,
    "select": torch.select,
    "index_select": torch.index_select,
    "getitem": operator.getitem,
    "cat": _concatenate,
    **{name: _concatenation(axis) for name, axis in _STACKS.items()},
    "stack": torch.stack,
    "meshgrid": torch.meshgrid,
    "pixel_shuffle": F.pixel_shuffle,
    "pixel_unshuffle": F.pixel_unshuffle,
    "channel_shuffle": _shuffle,
    **dict.fromkeys([*CASTS, "to", "type", "type_as"], _same),
    **dict.fromkeys(["contiguous", "clone", "detach"], _same),
}


MODULE_MOVES: dict[str, Callable[..., Any]] = {
    "flatten": lambda m, x: torch.flatten(x, m.start_dim, m.end_dim),
    "unflatten": lambda m, x: torch.unflatten(x, m.dim, m.unflattened_size),
    "pixel_shuffle": lambda m, x: F.pixel_shuffle(x, m.upscale_factor),
    "pixel_unshuffle": lambda m, x: F.pixel_unshuffle(x, m.downscale_factor),
    "channel_shuffle": lambda m, x: _shuffle(x, m.groups),
}


def holds_tensor(value: Any) -> bool:
    """Whether a value is a tensor, or has one in it."""
    if isinstance(value, tuple | list):
        return any(map(holds_tensor, value))
    return isinstance(value, Tensor)
