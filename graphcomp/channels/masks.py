"""A removal as zeros: the same graph and shapes, and all accuracy that a removal loses is lost here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.channels.labels import Marks
from graphcomp.channels.model import Channels, Mixing
from graphcomp.channels.shifts import Shift
from graphcomp.ir import Program, assemble, masked_norm, masked_spread, parts

MASK_PREFIX = "graphcomp_mask_"


def mask(channels: Channels, gone: Marks, shifts: Sequence[Shift]) -> Program:
    """See `Removal.mask`."""
    program = channels.program
    replaced: dict[str, Tensor] = {}
    for shift in shifts:
        bias = program.tensors.get(f"{shift.layer}.bias")
        if bias is not None:
            replaced[f"{shift.layer}.bias"] = bias.detach() + shift.amount.to(bias)
    for axis in channels.axes:
        if axis.reads and gone[axis.channels].any():
            (name, dim), *_ = axis.tensors
            old = replaced.get(name, program.tensors[name])
            replaced[name] = _zero(old.detach().clone(), dim, gone[axis.channels], axis.groups)
    root, graph = parts(program, replaced)
    _add_biases(program, root, shifts)
    new = dict(zip(program.graph.nodes, graph.nodes, strict=True))
    for join in channels.joins:
        for position, operand in enumerate(join.operands):
            if (gone[operand] & ~gone[join.result]).any():
                node = new[join.node]
                like = program.values[join.node]
                name = _held(root, f"{node.name}_{position}", ~gone[operand], join.axis, like)
                args = list(node.args)
                args[position] = _insert(graph, node, cast(fx.Node, args[position]), name, torch.mul)
                node.args = tuple(args)
    placed: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for mixing in channels.mixings:
        if gone[mixing.channels].any():
            _stand_in(root, graph, mixing, ~gone[mixing.channels], new, program.values[mixing.source], placed)
    return replace(program, module=assemble(program, root, graph))


def _add_biases(program: Program, root: nn.Module, lost: Sequence[Shift]) -> None:
    """Biases for readers that have none; one where a layer goes by several names."""
    made: dict[int, nn.Parameter] = {}
    for shift in lost:
        old = program.layer(shift.layer)
        if getattr(old, "bias", None) is None:
            weight = cast(nn.Parameter, old.weight)
            bias = nn.Parameter(shift.amount.to(weight), requires_grad=weight.requires_grad)
            root.get_submodule(shift.layer)._parameters["bias"] = made.setdefault(id(old), bias)


def _zero(weight: Tensor, dim: int, gone: Marks, groups: int) -> Tensor:
    columns = torch.from_numpy(gone).reshape(groups, -1)
    blocks = weight.reshape(groups, -1, *weight.shape[1:]) if groups > 1 else weight.unsqueeze(0)
    for block, zero in zip(blocks, columns, strict=True):
        block.movedim(dim, 0)[zero] = 0
    return blocks.reshape(weight.shape)


def _stand_in(
    root: nn.Module,
    graph: fx.Graph,
    mixing: Mixing,
    kept: Marks,
    new: Mapping[fx.Node, fx.Node],
    like: Tensor,
    placed: dict[tuple[fx.Node, fx.Node], fx.Node],
) -> None:
    """What an operator has to read in the place of channels that go; if all go, nobody reads its result.

    `placed`: what it reads by now in the place of an operand, of which two axes may lose channels.
    """
    if not kept.any():
        return
    node, at = new[mixing.node], (mixing.node, mixing.source)
    source = placed.get(at, new[mixing.source])
    position = next(i for i in count() if not hasattr(root, f"{MASK_PREFIX}{node.name}_{i}"))
    name = _held(root, f"{node.name}_{position}", kept, mixing.axis, like)
    held = root.get_buffer(name)
    function: Callable[..., Any] = torch.mul
    args = mixing.args
    if mixing.how == "mean":
        held.mul_(len(kept) / int(kept.sum()))
    elif mixing.how in ("lowest", "highest"):
        limits = torch.finfo(held.dtype)  # finite: behind a logarithm infinity times zero would be read
        function, args = torch.masked_fill, (limits.min if mixing.how == "lowest" else limits.max,)
        root.register_buffer(name, held == 0)
    elif mixing.how in ("spread", "norm"):
        function = masked_spread if mixing.how == "spread" else masked_norm
    placed[at] = _insert(graph, node, source, name, function, args)
    node.replace_input_with(source, placed[at])


def _held(root: nn.Module, name: str, kept: Marks, axis: int, like: Tensor) -> str:
    """1 for channels that stay and 0 for those that go, as a buffer of what is masked; returns its name."""
    view = [1] * like.ndim
    view[axis] = len(kept)
    name = f"{MASK_PREFIX}{name}"
    root.register_buffer(name, torch.from_numpy(kept).to(like.dtype).reshape(view))
    return name


def _insert(
    graph: fx.Graph,
    node: fx.Node,
    source: fx.Node,
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
) -> fx.Node:
    """function(source, buffer, *args), in front of a node."""
    with graph.inserting_before(node):
        held = graph.create_node("get_attr", name)
        masked = graph.call_function(function, (source, held, *args))
    for made in (held, masked):
        made.meta = dict(node.meta)
    return masked


def remove_masks(graph: fx.Graph) -> None:
    """Take out what `mask` put in front of joins and of what mixes channels."""
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target).startswith(MASK_PREFIX):
            for masked in list(node.users):
                masked.replace_all_uses_with(cast(fx.Node, masked.args[0]))
                graph.erase_node(masked)
            graph.erase_node(node)
