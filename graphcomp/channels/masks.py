"""A removal as zeros: the same graph and shapes, and all accuracy that a removal loses is lost here."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx, nn

from graphcomp.channels.labels import Marks
from graphcomp.channels.model import Channels
from graphcomp.channels.shifts import Shift
from graphcomp.ir import Program, assemble, parts

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
                _insert_mask(
                    root,
                    graph,
                    new[join.node],
                    position,
                    join.axis,
                    ~gone[operand],
                    program.shape(join.node) or (),
                )
    for product in channels.contractions:
        if gone[product.channels].any():
            at = next(i for i, a in enumerate(product.node.args) if a is product.source)
            kept, shape = ~gone[product.channels], program.shape(product.source) or ()
            _insert_mask(root, graph, new[product.node], at, product.axis, kept, shape)
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


def _insert_mask(
    root: nn.Module,
    graph: fx.Graph,
    node: fx.Node,
    position: int,
    axis: int,
    kept: Marks,
    shape: Sequence[int],
) -> None:
    name = f"{MASK_PREFIX}{node.name}_{position}"
    view = [1] * len(shape)
    view[axis] = len(kept)
    dtype = next((p.dtype for p in root.parameters()), torch.float32)
    root.register_buffer(name, torch.from_numpy(kept).to(dtype).reshape(view))
    operand = cast(fx.Node, node.args[position])
    with graph.inserting_before(node):
        weight = graph.create_node("get_attr", name)
        masked = graph.call_function(torch.mul, (operand, weight))
    for new in (weight, masked):
        new.meta = dict(node.meta)
    args = list(node.args)
    args[position] = masked
    node.args = tuple(args)


def remove_masks(graph: fx.Graph) -> None:
    """Take out what `mask` put in front of joins and products."""
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target).startswith(MASK_PREFIX):
            for masked in list(node.users):
                masked.replace_all_uses_with(cast(fx.Node, masked.args[0]))
                graph.erase_node(masked)
            graph.erase_node(node)
