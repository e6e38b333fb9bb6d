"""Data movement on smaller tensors: each node must deliver the old tensor with positions deleted.

A node that would not by itself gets its literals rewritten (`view(-1, 64, 8, 8)`, `chunk` → `split`), or is
bypassed by one `index_select` (a channel shuffle whose halves lose different channels).
"""

import operator
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphcomp.channels.cuts import GONE, RAGGED, apply_cut, apply_cuts, equal, has_ragged, shrunk
from graphcomp.channels.indexing import entry_of, full_index, insert_select, picked, slice_of
from graphcomp.channels.labels import Marks, along, compact
from graphcomp.channels.model import Channels
from graphcomp.channels.moves import CONCATENATIONS, move, padding_of
from graphcomp.channels.rules import is_move
from graphcomp.errors import SurgeryError
from graphcomp.ir import PASS_KEY, Program, acts_in_place, op_name, same_memory, values_of


class Layouts:
    """The nodes of a smaller graph, as far as they move data.

    Attributes:
        program, channels, gone, pass_name: of the removal.
        idle: nodes of the old graph that go.
        root, graph: in the making; `new` says which of its nodes stands for which.
        cuts: old node -> how its value shrinks. numbers: the same of what is no tensor: the new value.
    """

    program: Program
    channels: Channels
    gone: Marks
    pass_name: str
    idle: set[fx.Node]
    root: nn.Module
    graph: fx.Graph
    new: dict[fx.Node, fx.Node]
    cuts: dict[fx.Node, Any]
    numbers: dict[fx.Node, Any]

    def fix(self, node: fx.Node) -> None:
        """Make a data movement node deliver the old tensor with positions deleted."""
        if self.op(node) == "pad":
            return self.fix_pad(node)
        if has_ragged(self.cuts[node]):
            return None  # who reads it is bypassed, or `refuse_ragged` will say so
        if self.fix_operands(node):
            return None
        try:
            if self.delivers(node, node):
                return None
        except (RuntimeError, ValueError, TypeError, IndexError):
            pass  # the sizes do not divide any more: rewrite below
        for rewrite in (self.fix_sizes, self.fix_split, self.fix_item, self.bypass):
            if rewrite(node):
                self.new[node].meta[PASS_KEY] = self.pass_name
                return None
        raise self.refusal(node, f"an arrangement of channels that {self.op(node)} cannot reproduce")

    def fix_piece(self, node: fx.Node) -> None:
        """`pieces[2]` and `pieces[1:]`: pieces that are gone do not count any more."""
        source, index = cast(fx.Node, node.args[0]), node.args[1]
        cuts = self.cuts.get(source)
        if not isinstance(cuts, list) or has_ragged(self.cuts[node]):
            return
        if has_ragged(cuts):
            if not self.bypass(node):
                raise self.refusal(node, "pieces without a channel axis")
            return
        left = [i for i, cut in enumerate(cuts) if cut is not GONE]
        whole = picked(range(len(cuts)), fx.node.map_arg(index, self.program.values.__getitem__))
        wanted = [i for i in whole if i in left]
        if picked(left, fx.node.map_arg(index, self.numbers.__getitem__)) == wanted:
            return
        at = [left.index(i) for i in wanted]
        new = at[0] if isinstance(self.program.values[node], Tensor) else slice_of(at)
        if new is None:
            raise self.refusal(node, "pieces that no slice picks")
        self.new[node].args = (self.new[source], new)
        self.new[node].meta[PASS_KEY] = self.pass_name

    def delivers(self, node: fx.Node, candidate: fx.Node) -> bool:
        """Whether `candidate`, run on the smaller operands, yields the smaller result, place by place."""
        if any(has_ragged(self.cuts.get(s, self.numbers.get(s))) for s in candidate.all_input_nodes):
            return False
        start = 1

        def numbered(labels: Any) -> Any:
            nonlocal start
            if not isinstance(labels, Tensor):
                return tuple(map(numbered, labels))
            thin = compact(labels)
            start += thin.numel()
            return torch.arange(start - thin.numel(), start).reshape(thin.shape).expand(labels.shape)

        sources = [s for s in node.all_input_nodes if _is_labelled(self.channels.values[s])]
        ids = {s: numbered(self.channels.values[s]) for s in sources}
        whole = move(self.program, node, ids.__getitem__, self.program.values.__getitem__)
        small = {s: apply_cuts(x, self.cuts[s]) for s, x in ids.items() if s in candidate.all_input_nodes}
        found = move(self.program, candidate, small.__getitem__, self.numbers.__getitem__)
        if isinstance(whole, Tensor):
            return equal(found, apply_cut(whole, self.cuts[node]))
        wanted = apply_cuts(whole, self.cuts[node])
        return len(found) == len(wanted) and all(map(equal, found, wanted))

    def commit(self, node: fx.Node, candidate: fx.Node) -> None:
        """Give the new node the arguments of a candidate that was tried on the old graph."""
        new = self.new[node]
        new.op, new.target = candidate.op, candidate.target
        new.args = fx.node.map_arg(candidate.args, lambda s: self.new[s])
        new.kwargs = fx.node.map_arg(candidate.kwargs, lambda s: self.new[s])

    def attempt(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Commit the call if it delivers."""
        op = node.op if target is node.target else "call_function"
        candidate = fx.Graph().create_node(op, target, args, kwargs)
        try:
            good = self.delivers(node, candidate)
        except (RuntimeError, ValueError, TypeError, IndexError):
            good = False
        if good:
            self.commit(node, candidate)
        for source in candidate.all_input_nodes:
            source.users.pop(candidate, None)
        return good

    def fix_operands(self, node: fx.Node) -> bool:
        """A concatenation goes on without operands that have no channels left."""
        if self.op(node) not in CONCATENATIONS or not any(s in self.idle for s in node.all_input_nodes):
            return False
        operands, *rest = node.args
        left = tuple(s for s in cast(Sequence[fx.Node], operands) if s not in self.idle)
        if not self.attempt(node, node.target, (left, *rest), dict(node.kwargs)):
            raise self.refusal(node, "operands of a concatenation that are needed")
        self.new[node].meta[PASS_KEY] = self.pass_name
        return True

    def fix_sizes(self, node: fx.Node) -> bool:
        """Sizes in view, reshape, expand and unflatten that are not derived from the tensor itself."""
        if self.op(node) not in ("view", "reshape", "expand", "broadcast_to", "unflatten"):
            return False
        cut, old = self.cuts[node], self.program.shape(node) or ()
        wanted = shrunk(old, cut)

        def stale(size: Any) -> bool:
            """A literal, or the channel count of some other tensor."""
            return isinstance(size, int) or self.numbers.get(size) != self.program.values[size]

        def resize(sizes: Sequence[Any], first: int) -> list[Any]:
            wrong = [
                (stale(s) or wanted[first + i] != old[first + i])
                and self.program.values.get(s, s) == old[first + i]
                for i, s in enumerate(sizes)
            ]
            # samples among the channels (`x.view(1, b * 16, h, w)`): what is left for other batches, too
            return [
                -1 if w and self.follows_batch(s) else wanted[first + i] if w else s
                for i, (s, w) in enumerate(zip(sizes, wrong, strict=True))
            ]

        args, target = list(node.args), node.target
        if node.op == "call_module":
            module = cast(nn.Unflatten, self.program.layer(cast(str, target)))
            target, args = torch.unflatten, [*args, module.dim, tuple(module.unflattened_size)]
        if self.op(node) == "unflatten":
            source = cast(fx.Node, args[0])
            dim = self.settled(args[1]) % len(self.program.shape(source) or ())
            args[2] = tuple(resize(cast(Sequence[Any], args[2]), dim))
        elif len(args) == 2 and isinstance(args[1], tuple | list):
            args[1] = tuple(resize(args[1], 0))
        else:
            args[1:] = resize(args[1:], 0)
        return self.attempt(node, target, tuple(args), dict(node.kwargs))

    def follows_batch(self, size: Any) -> bool:
        """Whether a size is another one for two samples."""
        if not isinstance(size, fx.Node):
            return False
        values = values_of(self.program)
        return bool(values.of(size, 2) != values.of(size))

    def settled(self, argument: Any) -> int:
        """A dimension, which a network may compute."""
        return cast(int, self.program.values.get(argument, argument))

    def fix_split(self, node: fx.Node) -> bool:
        """chunk, split and tensor_split become a split into the surviving sizes."""
        if self.op(node) not in ("chunk", "split", "tensor_split"):
            return False
        old = self.program.shape(cast(fx.Node, node.args[0])) or ()
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        pieces = [p.shape for p in self.program.values[node]]
        sizes = [
            shrunk(shape, cut)[self.settled(dim) % len(old)]
            for shape, cut in zip(pieces, self.cuts[node], strict=True)
            if cut is not GONE
        ]
        return self.attempt(node, torch.split, (node.args[0], sizes, dim), {})

    def fix_item(self, node: fx.Node) -> bool:
        """x[…] along channels: new bounds, or an index_select in front of the rest of the item."""
        if self.op(node) not in ("getitem", "select"):
            return False
        source = cast(fx.Node, node.args[0])
        cut, shape = self.cuts[source], self.program.shape(source) or ()
        if not isinstance(cut, tuple):
            return False
        axis, kept = cut
        if self.op(node) == "select":
            items: list[Any] = [slice(None)] * len(shape)
            given = [*node.args[1:], *(node.kwargs[k] for k in ("dim", "index") if k in node.kwargs)]
            items[self.settled(given[0])] = given[1]
        else:
            items = full_index(node.args[1], len(shape))
        where = entry_of(items, axis)
        entry = None if where is None else fx.node.map_arg(items[where], self.program.values.__getitem__)
        if where is None or not isinstance(entry, int | slice):
            return False
        wanted = torch.arange(shape[axis])[entry]
        rank = torch.full((shape[axis],), -1).scatter(0, kept, torch.arange(kept.numel()))
        if isinstance(entry, int):
            items[where] = int(rank[wanted])
            return self.set_item(node, items)
        positions = rank[wanted][rank[wanted] >= 0]
        first = int(positions[0]) if positions.numel() else 0
        if torch.equal(positions, torch.arange(first, first + positions.numel())):
            items[where] = slice(first, first + positions.numel())
            return self.set_item(node, items)
        items[where] = slice(None)
        new = self.new[node]
        with self.graph.inserting_before(new):
            picked = self.select(self.new[source], axis, positions, node.name)
        new.op, new.target, new.args, new.kwargs = (
            "call_function",
            operator.getitem,
            (picked, tuple(items)),
            {},
        )
        return True

    def set_item(self, node: fx.Node, items: list[Any]) -> bool:
        """Commit `x[items]` if it delivers."""
        return self.attempt(node, operator.getitem, (node.args[0], tuple(items)), {})

    def bypass(self, node: fx.Node) -> bool:
        """Replace a chain of moves whose net effect is on one axis by an index_select of its beginning."""
        chain, source = [node], _parent(self.program, node)
        while source is not None:
            index = None if self.overwritten(source, chain) else self.net_index(source, chain)
            if index is not None:
                axis, positions = index
                new = self.new[node]
                with self.graph.inserting_before(new):
                    picked = self.select(self.new[source], axis, positions, node.name)
                new.replace_all_uses_with(picked)
                self.new[node] = picked
                return True
            chain, source = [*chain, source], _parent(self.program, source)
        return False

    def net_index(self, source: fx.Node, chain: Sequence[fx.Node]) -> tuple[int, Tensor] | None:
        """(axis, positions in the smaller source) that the chain amounts to; None if it does more."""
        cut, out_cut = self.cuts.get(source), self.cuts[chain[0]]
        old, new = self.program.shape(source), self.program.shape(chain[0])
        if not isinstance(cut, tuple) or old is None or new is None or len(old) != len(new):
            return None
        axis, kept = cut
        if any(old[d] != new[d] for d in range(len(old)) if d != axis):
            return None
        for d in range(len(old)):
            ran = self.run_chain(source, chain, along(torch.arange(old[d]), d, old))
            if d == axis:
                index = ran.movedim(axis, 0).reshape(new[axis], -1)
                if bool((index != index[:, :1]).any()):
                    return None
            elif not equal(ran, along(torch.arange(old[d]), d, new)):
                return None
        rank = torch.full((old[axis],), -1).scatter(0, kept, torch.arange(kept.numel()))
        positions = apply_cut(index[:, 0], (0, out_cut[1])) if isinstance(out_cut, tuple) else index[:, 0]
        return axis, rank[positions]

    def run_chain(self, source: fx.Node, chain: Sequence[fx.Node], tensor: Tensor) -> Tensor:
        """What a chain of moves (last first) makes of a tensor in place of `source`."""
        values: dict[fx.Node, Any] = {source: tensor}
        for node in reversed(chain):
            if is_item(self.program, node):
                values[node] = values[cast(fx.Node, node.args[0])][node.args[1]]
            else:
                values[node] = move(self.program, node, values.__getitem__, self.program.values.__getitem__)
        return cast(Tensor, values[chain[0]])

    def overwritten(self, source: fx.Node, chain: Sequence[fx.Node]) -> bool:
        """Whether an in-place operator changes `source` while a chain of moves (last first) is at work."""
        values, order = self.program.values, self.program.order
        return any(
            order[chain[-1]] < order[writer] < order[chain[0]]
            and same_memory(values[writer.all_input_nodes[0]], values[source])
            for writer in self.writers
        )

    @cached_property
    def writers(self) -> list[fx.Node]:
        """The in-place operators in the graph that stay."""
        module = self.program.module
        staying = (n for n in self.program.graph.nodes if n not in self.idle and n.all_input_nodes)
        return [n for n in staying if acts_in_place(module, n)]

    def select(self, source: fx.Node, axis: int, positions: Tensor, name: str) -> fx.Node:
        """Insert index_select(source, axis, positions)."""
        return insert_select(self.root, self.graph, source, axis, positions, name, self.pass_name)

    def fix_pad(self, node: fx.Node) -> None:
        """Padding beside channels shrinks with the channels that it stands for."""
        labels, cut = self.channels.values[node], self.cuts[node]
        padding = padding_of(self.program, node)
        if padding is None or not isinstance(cut, tuple):
            return
        amounts = padding.amounts(labels.ndim)
        if cut[0] not in amounts:
            return
        axis, kept = cut
        before, after = amounts[axis]
        size = labels.size(axis)
        amounts[axis] = (int((kept < before).sum()), int((kept >= size - after).sum()))
        flat = [n for d in range(labels.ndim - 1, min(amounts) - 1, -1) for n in amounts.get(d, (0, 0))]
        new = self.new[node]
        new.op, new.target = "call_function", F.pad
        value = () if padding.value is None else (padding.value,)
        new.args, new.kwargs = (new.args[0], flat, padding.mode, *value), {}
        new.meta[PASS_KEY] = self.pass_name

    def is_affected_move(self, node: fx.Node) -> bool:
        """Whether a node moves data that shrinks."""
        if not is_move(self.program, node):
            return False
        around = (node, *node.all_input_nodes)  # a pad's own zeros may go while its input stays
        return any(self.cuts.get(s) is not None for s in around) or any(
            map(self.is_other_number, node.all_input_nodes)
        )

    def is_other_number(self, node: fx.Node) -> bool:
        """Whether a number, or one of several, is another one than before."""
        return node in self.numbers and (
            self.numbers[node] is RAGGED or self.numbers[node] != self.program.values[node]
        )

    def refusal(self, node: fx.Node, found: str) -> SurgeryError:
        """An error that carries the channels that are in the way."""
        sources = [self.channels.values[s] for s in (node, *self.tensors_behind(node))]
        labels = [x for s in sources for x in (s if isinstance(s, tuple) else (s,)) if isinstance(x, Tensor)]
        ids = np.concatenate([self.channels.channel_of[compact(x).flatten().numpy()] for x in labels])
        return SurgeryError(
            f"{node.name}: found {found} after removal, expected whole rows or columns to go; "
            "exclude the layers that produce its input",
            node.name,
            frozenset(np.unique(ids[self.gone[ids]]).tolist()),
        )

    def tensors_behind(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a node, and for those that are numbers the tensors that these count."""
        found: list[fx.Node] = []
        for source in node.all_input_nodes:
            found += self.tensors_behind(source) if source in self.numbers else [source]
        return found

    def op(self, node: fx.Node) -> str:
        """The name of the operator, by which rewrites are chosen."""
        return op_name(self.program, node)


def _is_labelled(value: Any) -> bool:
    """Whether a node yields labels, in one tensor or several."""
    if isinstance(value, tuple | list):
        return bool(value) and all(isinstance(x, Tensor) for x in value)
    return isinstance(value, Tensor)


def is_item(program: Program, node: fx.Node) -> bool:
    """`pieces[1]` of a chunk or split."""
    if node.target is not operator.getitem:
        return False
    return isinstance(program.values[cast(fx.Node, node.args[0])], tuple | list)


def _parent(program: Program, node: fx.Node) -> fx.Node | None:
    """The one tensor that a move moves, if there is one."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not (is_move(program, node) or is_item(program, node)):
        return None
    return source
