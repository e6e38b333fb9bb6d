"""Removing channels from a program, exactly.

They are taken out of every tensor that they sit on. The invariant that makes this local: every tensor of the
smaller graph is the old one with positions deleted, in the old order. What moves data around is made to
deliver that in `channels.layouts`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphcomp.channels.cuts import (
    GONE,
    RAGGED,
    Cut,
    Gone,
    Ragged,
    apply_cut,
    has_ragged,
    pick,
    shapes_of,
    shrunk,
)
from graphcomp.channels.labels import Marks, compact, varying
from graphcomp.channels.layers import norm_axis
from graphcomp.channels.layouts import Layouts, is_item
from graphcomp.channels.liveness import Idle
from graphcomp.channels.masks import remove_masks
from graphcomp.channels.model import ELEMENTS, Axis, Channels, Join
from graphcomp.channels.rules import is_move
from graphcomp.channels.tracker import Unread
from graphcomp.errors import SurgeryError, TraceError
from graphcomp.ir import PASS_KEY, Program, RecurrentLayer, assemble, eliminate_dead_nodes, parts, same_memory


class Surgeon(Layouts):
    """One removal; on the meta device, where no weight is copied, to see whether it succeeds."""

    def __init__(
        self, channels: Channels, gone: Marks, idle: Idle, pass_name: str, on_meta: bool = False
    ) -> None:
        self.program = program = channels.program
        self.channels, self.gone, self.pass_name = channels, gone, pass_name
        self.idle = {node for node, is_idle in zip(program.graph.nodes, idle.nodes, strict=True) if is_idle}
        self.unused = idle.tensors
        self.kept = torch.from_numpy(~gone[channels.channel_of])
        self.tensors = {n: t.detach().to("meta") if on_meta else t for n, t in program.tensors.items()}
        replaced = self.sliced_tensors()
        self.sliced = {id(program.tensors[name]): tensor for name, tensor in replaced.items()}
        whole = {
            n: t for n, t in self.tensors.items() if on_meta and id(program.tensors[n]) not in self.sliced
        }
        self.root, self.graph = parts(program, {**whole, **replaced})
        self.new = dict(zip(program.graph.nodes, self.graph.nodes, strict=True))
        self.changed_layers = {name.rpartition(".")[0] for name in replaced}
        self.cuts: dict[fx.Node, Any] = {}
        self.numbers: dict[fx.Node, Any] = {}
        self.joins = {j.node: j for j in channels.joins}
        self.known_cuts: dict[int, Cut] = {}

    def run(self) -> Program:
        """See `Removal.apply`."""
        for node in self.program.graph.nodes:
            self.visit(node)
        remove_masks(self.graph)
        self.erase_idle()
        eliminate_dead_nodes(self.graph, self.root)
        self.refuse_ragged()
        self.graph.lint()
        module = assemble(self.program, self.root, self.graph)
        result = replace(self.program, module=module)
        self.check_shapes(result)
        self.refuse_moved_memory(result)
        return result

    def erase_idle(self) -> None:
        """Also what acts in place, on memory that nobody reads."""
        alive = set(self.graph.nodes)
        for node in reversed(list(self.program.graph.nodes)):
            if node in self.idle and self.new[node] in alive:
                self.graph.erase_node(self.new[node])

    def refuse_ragged(self) -> None:
        """SurgeryError for what is left and has no channel axis any more."""
        alive = set(self.graph.nodes)
        for node, cut in self.cuts.items():
            if has_ragged(cut) and self.new[node] in alive:
                raise self.refusal(node, "a layout without a channel axis")

    def check_shapes(self, result: Program) -> None:
        """Every tensor of the smaller graph must have the shape that its cut says."""
        copied = dict(zip(self.graph.nodes, result.graph.nodes, strict=True))
        try:
            values = result.values
        except TraceError as error:
            raise SurgeryError(f"{error}; this is a bug in graphcomp: please report it") from error
        for node, cut in self.cuts.items():
            new = copied.get(self.new[node])
            if new is None or node.op == "output" or isinstance(self.channels.values[node], Unread):
                continue  # no labels of its own: a tensor that a layer holds, and what the program returns
            wanted, found = shapes_of(self.program.values[node], cut), shapes_of(values[new])
            if node in self.channels.second:
                axis, channels = self.channels.second[node]
                wanted = shrunk(wanted, (axis, _indices(~self.gone[channels])))
            if wanted != found:
                raise SurgeryError(
                    f"{node.name}: found shape {found} after removal, expected {wanted}; this is a bug in "
                    "graphcomp: please report it",
                    node.name,
                )

    def refuse_moved_memory(self, result: Program) -> None:
        """What an in-place operator writes through a view must reach the same readers as before."""
        old, order, alive = self.program.values, self.program.order, set(self.graph.nodes)
        for writer in self.writers:
            at, written = order[writer], writer.all_input_nodes[0]
            if not (is_move(self.program, written) or is_item(self.program, written)):
                continue
            for node in self.program.graph.nodes:
                if node is writer:
                    break
                read_later = node is not written and any(order[user] > at for user in node.users)
                if not read_later or self.new[node] not in alive:
                    continue
                before = same_memory(old[node], old[written])
                if before != same_memory(result.values[self.new[node]], result.values[self.new[written]]):
                    raise self.refusal(written, f"memory shared with {node.name}, and written in place,")

    # -------------------------------------------------------------- tensors

    def sliced_tensors(self) -> dict[str, Tensor]:
        """Every tensor that shrinks, by name."""
        selections: dict[str, dict[int, Axis]] = {}
        self.indices: dict[int, Tensor] = {}
        for axis in self.channels.axes:
            gone = self.gone[axis.channels]
            if gone.any():
                self.indices[id(axis)] = _indices(~gone)
                for name, dim in axis.tensors:
                    if name not in self.unused:
                        selections.setdefault(name, {})[dim] = axis
        return {name: self.slice(name, dims) for name, dims in selections.items()}

    def slice(self, name: str, dims: Mapping[int, Axis]) -> Tensor:
        """A tensor without the positions that go."""
        tensor = self.tensors[name].detach()
        if ELEMENTS in dims:
            cut = self.cut_of(torch.from_numpy(dims[ELEMENTS].channels), of_channels=True)
            if isinstance(cut, Ragged | Gone):
                raise SurgeryError(
                    f"{name}: found a tensor without a channel axis, expected whole rows to go"
                )
            return apply_cut(tensor, cut)
        grouped = next((d for d, a in dims.items() if a.groups > 1), None)
        if grouped is not None:
            return self.slice_grouped(tensor, dims, grouped)
        for dim, axis in dims.items():
            tensor = pick(tensor, dim, self.indices[id(axis)])
        return tensor

    def slice_grouped(self, tensor: Tensor, dims: Mapping[int, Axis], grouped: int) -> Tensor:
        """A grouped weight: rows come in blocks, and each block has columns of its own."""
        groups = dims[grouped].groups
        columns = ~self.gone[dims[grouped].channels].reshape(groups, -1)
        rows = np.ones((groups, tensor.size(0) // groups), bool)
        if 0 in dims:
            rows = ~self.gone[dims[0].channels].reshape(groups, -1)
        blocks = tensor.reshape(groups, -1, *tensor.shape[1:])
        parts = [
            pick(pick(block, 0, _indices(r)), 1, _indices(c))
            for block, r, c in zip(blocks, rows, columns, strict=True)
        ]
        return torch.cat(parts)

    # -------------------------------------------------------------- nodes

    def cut_of(self, labels: Tensor, of_channels: bool = False) -> Cut:
        """How a tensor with these labels shrinks; nodes that pass labels on share them, and the answer."""
        if of_channels:
            return self.find_cut(labels, torch.from_numpy(~self.gone))
        if id(labels) not in self.known_cuts:
            self.known_cuts[id(labels)] = self.find_cut(labels, self.kept)
        return self.known_cuts[id(labels)]

    def find_cut(self, labels: Tensor, keep: Tensor) -> Cut:
        """The same, not remembered."""
        thin = compact(labels)
        axes = varying(thin)
        kept = keep.numpy()[thin.numpy()]
        if kept.all():
            return None
        if not kept.any():
            return GONE
        for axis in axes:
            flat = (
                kept.ravel() if len(axes) == 1 else np.moveaxis(kept, axis, 0).reshape(kept.shape[axis], -1)
            )
            first = flat if len(axes) == 1 else flat[:, 0]
            if len(axes) == 1 or (flat == flat[:, :1]).all():
                return axis, torch.from_numpy(np.flatnonzero(first))
        return RAGGED

    def visit(self, node: fx.Node) -> None:
        """Say how the value of a node shrinks, and rewrite the node."""
        labels = self.channels.values[node]
        if isinstance(labels, tuple | list) and labels and all(isinstance(x, Tensor) for x in labels):
            self.cuts[node] = [self.cut_of(x) for x in labels]
        elif isinstance(labels, Tensor):
            self.cuts[node] = self.cut_of(labels)
        elif isinstance(labels, Unread) or node.op == "output":
            self.cuts[node] = None
        else:
            self.numbers[node] = self.number(node)
            return
        if node in self.idle:
            return
        if node.op == "call_module" and (node.target in self.changed_layers or self.loses_input(node)):
            self.sync(node)
        if node in self.joins:
            self.pad_join(self.joins[node])
        elif is_item(self.program, node):
            self.fix_piece(node)
        elif self.is_affected_move(node):
            self.fix(node)
        elif not is_move(self.program, node) and any(map(self.is_other_number, node.all_input_nodes)):
            raise self.refusal(node, "a number of channels that another operator computes with")

    def number(self, node: fx.Node) -> Any:
        """A shape or a number, from the smaller shapes."""
        sources = node.all_input_nodes
        if any(self.cuts.get(s) in (RAGGED, GONE) or self.numbers.get(s) is RAGGED for s in sources):
            return RAGGED
        if node.op != "call_function" and node.op != "call_method":
            return self.program.values[node]
        if not any(self.cuts.get(s) or self.slice_of(s) is not None for s in sources) and all(
            self.numbers.get(s) == self.program.values[s] for s in sources if s in self.numbers
        ):
            return self.program.values[node]

        def load(source: fx.Node) -> Any:
            return self.numbers[source] if source in self.numbers else self.meta(source)

        args, kwargs = fx.node.map_arg(node.args, load), fx.node.map_arg(node.kwargs, load)
        if node.op == "call_method":
            return getattr(args[0], cast(str, node.target))(*args[1:], **kwargs)
        return cast(Callable[..., Any], node.target)(*args, **kwargs)

    def slice_of(self, node: fx.Node) -> Tensor | None:
        """What a parameter or buffer became."""
        return (
            self.sliced.get(id(self.program.tensors.get(str(node.target)))) if node.op == "get_attr" else None
        )

    def meta(self, source: fx.Node) -> Any:
        """A value of the smaller graph, on the meta device."""
        value, sliced = self.program.values[source], self.slice_of(source)
        if sliced is not None:
            return sliced.to("meta")
        return apply_cut(value, self.cuts[source]) if isinstance(value, Tensor) else value

    def loses_input(self, node: fx.Node) -> bool:
        """Whether something that arrives shrinks."""
        return any(self.cuts.get(s) is not None for s in node.all_input_nodes)

    def sync(self, node: fx.Node) -> None:
        """Module attributes follow their tensors."""
        target = cast(str, node.target)
        module = self.root.get_submodule(target)
        source = next((a for a in node.args if isinstance(a, fx.Node)), None)
        cut = self.cuts.get(source) if source is not None else None
        before, kept = self.program.layer(target), None
        if source is not None and isinstance(cut, tuple):
            shape = self.program.shape(source) or ()
            if isinstance(before, nn.LayerNorm | nn.RMSNorm):
                lengths = shrunk(shape, cut)[len(shape) - len(before.normalized_shape) :]
                cast(nn.LayerNorm, module).normalized_shape = lengths
            kept = cut[1] if cut[0] == norm_axis(before, len(shape)) else None
        sync_attributes(module, before, kept)
        if target in self.changed_layers:
            self.new[node].meta[PASS_KEY] = self.pass_name

    def pad_join(self, join: Join) -> None:
        """Put zeros back into an operand of an addition that lost more than the sum did."""
        result = ~self.gone[join.result]
        new = self.new[join.node]
        for position, operand in enumerate(join.operands):
            present = (~self.gone[operand])[result]
            if not present.all():
                args = list(new.args)
                with self.graph.inserting_before(new):
                    source = cast(fx.Node, args[position])
                    args[position] = self.spread(source, join, present, f"{join.node.name}_{position}")
                new.args = tuple(args)
                new.meta[PASS_KEY] = self.pass_name

    def spread(self, source: fx.Node, join: Join, present: Marks, name: str) -> fx.Node:
        """`source`'s channels where `present`, zeros elsewhere."""
        where = np.flatnonzero(present)
        first, last = int(where[0]), int(where[-1])
        ndim = len(self.program.shape(join.node) or ())
        planes = [0, 0] * (ndim - 1 - join.axis)
        contiguous = last - first + 1 == len(where)
        ends = [first, len(present) - 1 - last] if contiguous else [0, 1]
        padded = self.graph.call_function(F.pad, (source, [*planes, *ends]))
        padded.meta = {PASS_KEY: self.pass_name}
        if contiguous:
            return padded
        index = np.full(len(present), len(where))
        index[where] = np.arange(len(where))
        return self.select(padded, join.axis, torch.from_numpy(index), name)


def _indices(keep: Marks) -> Tensor:
    return torch.from_numpy(np.flatnonzero(keep))


def sync_attributes(module: nn.Module, before: nn.Module, kept: Tensor | None) -> None:
    """Set channel counts of a sliced module from its tensors.

    Args:
        module: sliced; changed in place.
        before: the module as it was: `groups` say whether it is depthwise, or what is normalised together.
        kept: positions of the channels that still arrive, None if all do (for modules without tensors).
    """
    width = None if kept is None else kept.numel()
    if isinstance(module, nn.modules.conv._ConvNd):
        rows, columns = module.weight.shape[:2]
        old = cast(nn.modules.conv._ConvNd, before)
        if old.groups == old.in_channels > 1:
            module.groups = rows if old.transposed else rows * old.groups // old.out_channels
        inside, outside = columns * module.groups, rows
        module.in_channels, module.out_channels = (
            (rows, columns * module.groups) if module.transposed else (inside, outside)
        )
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, RecurrentLayer):
        module.input_size = cast(Tensor, module.weight_ih).shape[1]
        module.hidden_size = cast(Tensor, module.weight_hh).shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.GroupNorm) and kept is not None:
        old_norm = cast(nn.GroupNorm, before)
        each = old_norm.num_channels // old_norm.num_groups
        module.num_groups, module.num_channels = (
            len(set((kept // each).tolist())),
            len(kept),
        )
    elif isinstance(module, nn.modules.batchnorm._NormBase) and width is not None:
        module.num_features = width
