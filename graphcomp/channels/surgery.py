"""Removing channels from a program, exactly.

`mask` writes zeros where removed channels are read (same graph, same shapes; all accuracy is lost here).
`remove` takes them out of every tensor that they sit on. The invariant that makes `remove` local: every
tensor of the smaller graph is the old one with positions deleted, in the old order. A data movement node that
would not deliver that by itself gets its literals rewritten (`view(-1, 64, 8, 8)`, `chunk` → `split`), or is
bypassed by one `index_select` (a channel shuffle whose halves lose different channels).
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphcomp.channels.constants import Shift, shifts
from graphcomp.channels.labels import Ints, along, compact, varying
from graphcomp.channels.liveness import live_of
from graphcomp.channels.model import ELEMENTS, Axis, Channels, Join
from graphcomp.channels.rules import CONCATENATIONS, is_move, move, norm_axis, padding_of
from graphcomp.channels.tracker import Unread
from graphcomp.errors import SurgeryError, TraceError
from graphcomp.ir import (
    PASS_KEY,
    Program,
    acts_in_place,
    assemble,
    eliminate_dead_nodes,
    op_name,
    parts,
    same_memory,
)

Drop = np.ndarray[Any, np.dtype[np.bool_]]
"""Which channels go: one bool a channel id."""

MASK_PREFIX = "graphcomp_mask_"

# ---------------------------------------------------------------------- which sets of channels can go


def no_drop(channels: Channels) -> Drop:
    """The empty choice."""
    return np.zeros(len(channels.channel_of), bool)


def legalise(channels: Channels, drop: Drop, score: np.ndarray[Any, Any]) -> Drop:
    """The largest part of `drop` that can be removed, keeping channels of high `score` first.

    Restores pinned channels, one channel of every tensor that would be left empty and is missed
    (`channels.liveness`), and channels of convolution groups that would become smaller than their siblings;
    then adds the sums of padded joins of which both operands are gone, and the channels of layers that work
    for nobody any more. Terminates since it only restores.
    """
    removable = no_drop(channels)
    for group in channels.removable:
        removable[group.channels] = True
    drop, derived = drop & removable, _derived(channels)
    _restore(channels, drop, score)
    if derived:
        drop[derived] = True
        drop[list(channels.pinned)] = False
        _settle_joins(channels, drop)
    return drop | live_of(channels).only_idle(drop)


def _derived(channels: Channels) -> list[int]:
    return [c for g in channels.groups if g.derived for c in g.channels.tolist()]


def _restore(channels: Channels, drop: Drop, score: np.ndarray[Any, Any]) -> None:
    while True:
        before = int(drop.sum())
        for span in live_of(channels).missed(drop):
            if drop[span].all():
                drop[span[np.argmax(score[span])]] = False
        idle = live_of(channels).idle_names(drop)
        for node, rows in channels.balanced:
            if node not in idle:
                _balance(rows, drop, score)
        if int(drop.sum()) == before:
            return


def _balance(rows: Ints, drop: Drop, score: np.ndarray[Any, Any]) -> None:
    width = int((~drop[rows]).sum(1).max())
    for row in rows:
        for channel in row[np.argsort(-score[row], kind="stable")]:
            if int((~drop[row]).sum()) >= width:
                break
            drop[channel] = False


def _settle_joins(channels: Channels, drop: Drop) -> None:
    """A sum's channel goes only if both operands' channels are gone.

    Which sums go follows from the other channels alone, not from scores: `drop_of` must find the same ones.
    """
    while True:
        before = int(drop.sum())
        for join in channels.joins:
            a, b = join.operands
            drop[join.result[~(drop[a] & drop[b])]] = False
        _restore(channels, drop, np.zeros(len(drop)))
        if int(drop.sum()) == before:
            return


def dropped_rows(channels: Channels, drop: Drop) -> dict[str, list[int]]:
    """The choice as plain data: layer -> output rows that go."""
    rows: dict[str, list[int]] = {}
    for axis in channels.axes:
        gone = np.flatnonzero(drop[axis.channels]).tolist() if axis.role == "out" else []
        if gone:
            rows[axis.tensors[0][0]] = gone
    return rows


def drop_of(channels: Channels, rows: Mapping[str, Sequence[int]]) -> Drop:
    """The choice back from `dropped_rows`; SurgeryError if it does not fit this program."""
    drop = no_drop(channels)
    axes = {a.tensors[0][0]: a for a in channels.axes if a.role == "out"}
    for name, gone in rows.items():
        if name not in axes:
            raise SurgeryError(
                f"{name}: found no such layer, expected one of {len(axes)} that produce channels"
            )
        width = len(axes[name].channels)
        outside = [row for row in gone if not 0 <= row < width]
        if outside:
            raise SurgeryError(f"{name}: found row {outside[0]}, expected 0 to {width - 1}")
        drop[axes[name].channels[list(gone)]] = True
    wanted = {k: sorted(set(v)) for k, v in rows.items() if v}
    if dropped_rows(channels, drop) != wanted:
        odd = next(k for k, v in dropped_rows(channels, drop).items() if wanted.get(k) != v)
        raise SurgeryError(
            f"{odd}: found a plan that splits coupled channels, expected a plan made for this program"
        )
    legal = legalise(channels, drop, np.zeros(len(drop)))
    lost = int((drop & ~legal).sum())
    if lost:
        raise SurgeryError(f"plan: found {lost} channels that cannot be removed, expected a legal choice")
    return legal


def feasible(channels: Channels, drop: Drop, score: np.ndarray[Any, Any]) -> tuple[Drop, dict[str, str]]:
    """`legalise`, then try the removal; what turns out to be in the way is kept, with the reason by node."""
    kept: dict[str, str] = {}
    drop = legalise(channels, drop, score)
    while True:
        try:
            _Surgeon(channels.program, channels, drop, "trial", on_meta=True).run()
            return drop, kept
        except SurgeryError as refusal:
            if not refusal.channels:
                raise
            kept[refusal.node] = str(refusal)
            drop = legalise(channels, drop & ~_with_operands(channels, refusal.channels), score)


def _with_operands(channels: Channels, ids: Iterable[int]) -> Drop:
    """These channels and, for sums among them, what they are sums of: a sum goes when both have gone."""
    wanted = no_drop(channels)
    wanted[list(ids)] = True
    for join in reversed(channels.joins):
        for operand in join.operands:
            wanted[operand[wanted[join.result]]] = True
    return wanted


# ---------------------------------------------------------------------- simulate


def mask(program: Program, channels: Channels, drop: Drop) -> Program:
    """Zeros where removed channels are read: in the columns of readers, and before padded joins.

    What readers lose with channels that hold a constant goes into their biases (`channels.constants`), so
    that it is lossless to remove filters of zeros. Readers without a bias get one.
    """
    lost = shifts(channels, drop)
    replaced: dict[str, Tensor] = {}
    for shift in lost:
        bias = program.tensors.get(f"{shift.layer}.bias")
        if bias is not None:
            replaced[f"{shift.layer}.bias"] = bias.detach() + shift.amount.to(bias)
    for axis in channels.axes:
        if axis.reads and drop[axis.channels].any():
            (name, dim), *_ = axis.tensors
            old = replaced.get(name, program.tensors[name])
            replaced[name] = _zero(old.detach().clone(), dim, drop[axis.channels], axis.groups)
    root, graph = parts(program, replaced)
    _add_biases(program, root, lost)
    new = dict(zip(program.graph.nodes, graph.nodes, strict=True))
    for join in channels.joins:
        for position, operand in enumerate(join.operands):
            if (drop[operand] & ~drop[join.result]).any():
                shape = program.shape(join.node) or ()
                _insert_mask(root, graph, new[join.node], position, join, ~drop[operand], shape)
    return Program(assemble(program, root, graph), program.example_inputs, program.history)


def _add_biases(program: Program, root: nn.Module, lost: Sequence[Shift]) -> None:
    """Biases for readers that have none; one where a layer goes by several names."""
    made: dict[int, nn.Parameter] = {}
    for shift in lost:
        old = program.layer(shift.layer)
        if getattr(old, "bias", None) is None:
            weight = cast(nn.Parameter, old.weight)
            bias = nn.Parameter(shift.amount.to(weight), requires_grad=weight.requires_grad)
            root.get_submodule(shift.layer)._parameters["bias"] = made.setdefault(id(old), bias)


def _zero(weight: Tensor, dim: int, gone: Drop, groups: int) -> Tensor:
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
    join: Join,
    kept: Drop,
    shape: Sequence[int],
) -> None:
    name = f"{MASK_PREFIX}{node.name}_{position}"
    view = [1] * len(shape)
    view[join.axis] = len(kept)
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


def _remove_masks(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target).startswith(MASK_PREFIX):
            for masked in list(node.users):
                masked.replace_all_uses_with(cast(fx.Node, masked.args[0]))
                graph.erase_node(masked)
            graph.erase_node(node)


# ---------------------------------------------------------------------- rewrite


def remove(program: Program, channels: Channels, drop: Drop, pass_name: str) -> Program:
    """Take the channels out of every tensor that they sit on, and rewrite what moves data around.

    Args:
        program: the program that `channels` was found in.
        drop: a legal choice (`legalise`).
        pass_name: recorded on every node that changes.

    Raises:
        SurgeryError: naming a node that cannot be rewritten exactly. `program` is untouched.
    """
    return _Surgeon(program, channels, drop, pass_name).run()


class _Ragged:
    """A tensor from which the channels cannot be deleted as hyperplanes; its users must be bypassed."""


class _Gone:
    """A tensor of which nothing is left: nobody reads it, and among others it is left out."""


RAGGED, GONE = _Ragged(), _Gone()
Cut = tuple[int, Tensor] | _Ragged | _Gone | None
"""How a tensor shrinks: (axis, positions to keep), not at all (None), to nothing, or not as a tensor.

A node that yields several tensors (a split) has a list of cuts. Like positions of a tensor, pieces that are
gone are deleted, and the others stay in their order.
"""


class _Surgeon:
    """One removal; on the meta device, where no weight is copied, to see whether it succeeds."""

    def __init__(
        self, program: Program, channels: Channels, drop: Drop, pass_name: str, on_meta: bool = False
    ) -> None:
        self.program, self.channels, self.drop, self.pass_name = program, channels, drop, pass_name
        marks = zip(program.graph.nodes, live_of(channels).idle(drop), strict=True)
        self.idle = {node for node, is_idle in marks if is_idle}
        self.kept = torch.from_numpy(~drop[channels.channel_of])
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
        for node in self.program.graph.nodes:
            self.visit(node)
        _remove_masks(self.graph)
        self.erase_idle()
        eliminate_dead_nodes(self.graph, self.root)
        self.refuse_ragged()
        self.graph.lint()
        module = assemble(self.program, self.root, self.graph)
        result = Program(module, self.program.example_inputs, self.program.history)
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
        alive = set(self.graph.nodes)
        for node, cut in self.cuts.items():
            if _has_ragged(cut) and self.new[node] in alive:
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
            wanted, found = _shapes(self.program.values[node], cut), _shapes(values[new])
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
            if not (is_move(self.program, written) or _is_item(self.program, written)):
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

    @cached_property
    def writers(self) -> list[fx.Node]:
        """The in-place operators in the graph that stay."""
        module = self.program.module
        staying = (n for n in self.program.graph.nodes if n not in self.idle and n.all_input_nodes)
        return [n for n in staying if acts_in_place(module, n)]

    def overwritten(self, source: fx.Node, chain: Sequence[fx.Node]) -> bool:
        """Whether an in-place operator changes `source` while a chain of moves (last first) is at work."""
        values, order = self.program.values, self.program.order
        return any(
            order[chain[-1]] < order[writer] < order[chain[0]]
            and same_memory(values[writer.all_input_nodes[0]], values[source])
            for writer in self.writers
        )

    # -------------------------------------------------------------- tensors

    def sliced_tensors(self) -> dict[str, Tensor]:
        selections: dict[str, dict[int, Axis]] = {}
        unused = live_of(self.channels).unused(self.drop)
        self.indices: dict[int, Tensor] = {}
        for axis in self.channels.axes:
            gone = self.drop[axis.channels]
            if gone.any():
                self.indices[id(axis)] = _indices(~gone)
                for name, dim in axis.tensors:
                    if name not in unused:
                        selections.setdefault(name, {})[dim] = axis
        return {name: self.slice(name, dims) for name, dims in selections.items()}

    def slice(self, name: str, dims: Mapping[int, Axis]) -> Tensor:
        tensor = self.tensors[name].detach()
        if ELEMENTS in dims:
            cut = self.cut_of(torch.from_numpy(dims[ELEMENTS].channels), of_channels=True)
            if isinstance(cut, _Ragged | _Gone):
                raise SurgeryError(
                    f"{name}: found a tensor without a channel axis, expected whole rows to go"
                )
            return _apply(tensor, cut)
        grouped = next((d for d, a in dims.items() if a.groups > 1), None)
        if grouped is not None:
            return self.slice_grouped(tensor, dims, grouped)
        for dim, axis in dims.items():
            tensor = _pick(tensor, dim, self.indices[id(axis)])
        return tensor

    def slice_grouped(self, tensor: Tensor, dims: Mapping[int, Axis], grouped: int) -> Tensor:
        """A grouped weight: rows come in blocks, and each block has columns of its own."""
        groups = dims[grouped].groups
        columns = ~self.drop[dims[grouped].channels].reshape(groups, -1)
        rows = np.ones((groups, tensor.size(0) // groups), bool)
        if 0 in dims:
            rows = ~self.drop[dims[0].channels].reshape(groups, -1)
        blocks = tensor.reshape(groups, -1, *tensor.shape[1:])
        parts = [
            _pick(_pick(block, 0, _indices(r)), 1, _indices(c))
            for block, r, c in zip(blocks, rows, columns, strict=True)
        ]
        return torch.cat(parts)

    # -------------------------------------------------------------- nodes

    def cut_of(self, labels: Tensor, of_channels: bool = False) -> Cut:
        """How a tensor with these labels shrinks; nodes that pass labels on share them, and the answer."""
        if of_channels:
            return self.find_cut(labels, torch.from_numpy(~self.drop))
        if id(labels) not in self.known_cuts:
            self.known_cuts[id(labels)] = self.find_cut(labels, self.kept)
        return self.known_cuts[id(labels)]

    def find_cut(self, labels: Tensor, keep: Tensor) -> Cut:
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

    def op(self, node: fx.Node) -> str:
        """The name of the operator, by which rewrites are chosen."""
        return op_name(self.program, node)

    def visit(self, node: fx.Node) -> None:
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
        elif _is_item(self.program, node):
            self.fix_piece(node)
        elif self.is_affected_move(node):
            self.fix(node)
        elif not is_move(self.program, node) and any(map(self.is_other_number, node.all_input_nodes)):
            raise self.refusal(node, "a number of channels that another operator computes with")

    def is_other_number(self, node: fx.Node) -> bool:
        """Whether a number, or one of several, is another one than before."""
        return node in self.numbers and (
            self.numbers[node] is RAGGED or self.numbers[node] != self.program.values[node]
        )

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
        value, sliced = self.program.values[source], self.slice_of(source)
        if sliced is not None:
            return sliced.to("meta")
        return _apply(value, self.cuts[source]) if isinstance(value, Tensor) else value

    def loses_input(self, node: fx.Node) -> bool:
        return any(self.cuts.get(s) is not None for s in node.all_input_nodes)

    def sync(self, node: fx.Node) -> None:
        """Module attributes follow their tensors."""
        target = cast(str, node.target)
        module = self.root.get_submodule(target)
        source = next((a for a in node.args if isinstance(a, fx.Node)), None)
        cut = self.cuts.get(source) if source is not None else None
        before, width = self.program.layer(target), None
        if source is not None and isinstance(cut, tuple):
            is_channels = cut[0] == norm_axis(before, len(self.program.shape(source) or ()))
            width = cut[1].numel() if is_channels else None
        sync_attributes(module, before, width)
        if target in self.changed_layers:
            self.new[node].meta[PASS_KEY] = self.pass_name

    def is_affected_move(self, node: fx.Node) -> bool:
        if not is_move(self.program, node):
            return False
        around = (node, *node.all_input_nodes)  # a pad's own zeros may go while its input stays
        return any(self.cuts.get(s) is not None for s in around) or any(
            map(self.is_other_number, node.all_input_nodes)
        )

    def fix(self, node: fx.Node) -> None:
        """Make a data movement node deliver the old tensor with positions deleted."""
        if self.op(node) == "pad":
            return self.fix_pad(node)
        if _has_ragged(self.cuts[node]):
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

    def refusal(self, node: fx.Node, found: str) -> SurgeryError:
        """An error that carries the channels that are in the way."""
        sources = [self.channels.values[s] for s in (node, *self.tensors_behind(node))]
        labels = [x for s in sources for x in (s if isinstance(s, tuple) else (s,)) if isinstance(x, Tensor)]
        ids = np.concatenate([self.channels.channel_of[compact(x).flatten().numpy()] for x in labels])
        return SurgeryError(
            f"{node.name}: found {found} after removal, expected whole rows or columns to go; "
            "exclude the layers that produce its input",
            node.name,
            frozenset(np.unique(ids[self.drop[ids]]).tolist()),
        )

    def tensors_behind(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a node, and for those that are numbers the tensors that these count."""
        found: list[fx.Node] = []
        for source in node.all_input_nodes:
            found += self.tensors_behind(source) if source in self.numbers else [source]
        return found

    def fix_piece(self, node: fx.Node) -> None:
        """`pieces[2]` and `pieces[1:]`: pieces that are gone do not count any more."""
        source, index = cast(fx.Node, node.args[0]), node.args[1]
        cuts = self.cuts.get(source)
        if not isinstance(cuts, list) or _has_ragged(self.cuts[node]):
            return
        if _has_ragged(cuts):
            if not self.bypass(node):
                raise self.refusal(node, "pieces without a channel axis")
            return
        left = [i for i, cut in enumerate(cuts) if cut is not GONE]
        whole = _picked(range(len(cuts)), fx.node.map_arg(index, self.program.values.__getitem__))
        wanted = [i for i in whole if i in left]
        if _picked(left, fx.node.map_arg(index, self.numbers.__getitem__)) == wanted:
            return
        at = [left.index(i) for i in wanted]
        new = at[0] if isinstance(self.program.values[node], Tensor) else _slice_of(at)
        if new is None:
            raise self.refusal(node, "pieces that no slice picks")
        self.new[node].args = (self.new[source], new)
        self.new[node].meta[PASS_KEY] = self.pass_name

    def delivers(self, node: fx.Node, candidate: fx.Node) -> bool:
        """Whether `candidate`, run on the smaller operands, yields the smaller result, place by place."""
        if any(_has_ragged(self.cuts.get(s, self.numbers.get(s))) for s in candidate.all_input_nodes):
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
        small = {s: _apply_all(x, self.cuts[s]) for s, x in ids.items() if s in candidate.all_input_nodes}
        found = move(self.program, candidate, small.__getitem__, self.numbers.__getitem__)
        if isinstance(whole, Tensor):
            return _equal(found, _apply(whole, self.cuts[node]))
        wanted = _apply_all(whole, self.cuts[node])
        return len(found) == len(wanted) and all(map(_equal, found, wanted))

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
        if self.op(node) not in ("view", "reshape", "expand", "unflatten"):
            return False
        cut, old = self.cuts[node], self.program.shape(node) or ()
        wanted = _shrunk(old, cut)

        def stale(size: Any) -> bool:
            """A literal, or the channel count of some other tensor."""
            return isinstance(size, int) or self.numbers.get(size) != self.program.values[size]

        def resize(sizes: Sequence[Any], first: int) -> list[Any]:
            wrong = [
                stale(s) and self.program.values.get(s, s) == old[first + i] for i, s in enumerate(sizes)
            ]
            return [wanted[first + i] if w else s for i, (s, w) in enumerate(zip(sizes, wrong, strict=True))]

        args, target = list(node.args), node.target
        if node.op == "call_module":
            module = cast(nn.Unflatten, self.program.layer(cast(str, target)))
            target, args = torch.unflatten, [*args, module.dim, tuple(module.unflattened_size)]
        if self.op(node) == "unflatten":
            source = cast(fx.Node, args[0])
            dim = cast(int, args[1]) % len(self.program.shape(source) or ())
            args[2] = tuple(resize(cast(Sequence[Any], args[2]), dim))
        elif len(args) == 2 and isinstance(args[1], tuple | list):
            args[1] = tuple(resize(args[1], 0))
        else:
            args[1:] = resize(args[1:], 0)
        return self.attempt(node, target, tuple(args), dict(node.kwargs))

    def fix_split(self, node: fx.Node) -> bool:
        """chunk, split and tensor_split become a split into the surviving sizes."""
        if self.op(node) not in ("chunk", "split", "tensor_split"):
            return False
        old = self.program.shape(cast(fx.Node, node.args[0])) or ()
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        pieces = [p.shape for p in self.program.values[node]]
        sizes = [
            _shrunk(shape, cut)[cast(int, dim) % len(old)]
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
            items[cast(int, given[0])] = given[1]
        else:
            items = _full_index(node.args[1], len(shape))
        where = _entry(items, axis)
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
            elif not _equal(ran, along(torch.arange(old[d]), d, new)):
                return None
        rank = torch.full((old[axis],), -1).scatter(0, kept, torch.arange(kept.numel()))
        positions = _apply(index[:, 0], (0, out_cut[1])) if isinstance(out_cut, tuple) else index[:, 0]
        return axis, rank[positions]

    def run_chain(self, source: fx.Node, chain: Sequence[fx.Node], tensor: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {source: tensor}
        for node in reversed(chain):
            if _is_item(self.program, node):
                values[node] = values[cast(fx.Node, node.args[0])][node.args[1]]
            else:
                values[node] = move(self.program, node, values.__getitem__, self.program.values.__getitem__)
        return cast(Tensor, values[chain[0]])

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

    def pad_join(self, join: Join) -> None:
        """Put zeros back into an operand of an addition that lost more than the sum did."""
        result = ~self.drop[join.result]
        new = self.new[join.node]
        for position, operand in enumerate(join.operands):
            present = (~self.drop[operand])[result]
            if not present.all():
                args = list(new.args)
                with self.graph.inserting_before(new):
                    source = cast(fx.Node, args[position])
                    args[position] = self.spread(source, join, present, f"{join.node.name}_{position}")
                new.args = tuple(args)
                new.meta[PASS_KEY] = self.pass_name

    def spread(self, source: fx.Node, join: Join, present: Drop, name: str) -> fx.Node:
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


def _indices(keep: Drop) -> Tensor:
    return torch.from_numpy(np.flatnonzero(keep))


def _pick(tensor: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Those positions of an axis; their shape on the meta device."""
    if tensor.is_meta:
        return tensor.narrow(axis, 0, positions.numel())
    return tensor.index_select(axis, positions)


def _apply(tensor: Tensor, cut: Cut) -> Tensor:
    """The tensor with positions deleted, still broadcast where it was."""
    if cut is None:
        return tensor
    if not isinstance(cut, tuple):
        raise SurgeryError("a tensor that is ragged or gone has no shape")
    axis, keep = cut
    if tensor.is_meta:
        return _pick(tensor, axis, keep)
    shape = [*tensor.shape[:axis], keep.numel(), *tensor.shape[axis + 1 :]]
    if tensor.size(axis) > 1 and tensor.stride(axis) == 0:
        return tensor.narrow(axis, 0, 1).expand(shape)
    return compact(tensor, keep=(axis,)).index_select(axis, keep).expand(shape)


def _apply_all(value: Any, cut: Any) -> Any:
    """`_apply` for a tensor or a tuple of tensors, of which those that are gone are left out."""
    if isinstance(cut, list):
        return tuple(_apply(v, c) for v, c in zip(value, cut, strict=True) if c is not GONE)
    return _apply(value, cut)


def _picked(pieces: Sequence[int], index: Any) -> list[int]:
    """The pieces that an index or slice picks; none if it is not there, or not known."""
    try:
        found = pieces[index]
    except (IndexError, TypeError):
        return []
    return list(found) if isinstance(index, slice) else [cast(int, found)]


def _slice_of(positions: Sequence[int]) -> slice | None:
    """The slice that yields these positions, if there is one."""
    first, step = (positions[0] if positions else 0), 1
    if len(positions) > 1:
        step = positions[1] - first
    end = first + step * len(positions)
    found = slice(first, end if end >= 0 else None, step)
    return found if list(range(max(positions, default=0) + 1))[found] == list(positions) else None


def _has_ragged(cut: Any) -> bool:
    return cut is RAGGED or isinstance(cut, list) and any(c is RAGGED for c in cut)


def _is_labelled(value: Any) -> bool:
    """Whether a node yields labels, in one tensor or several."""
    if isinstance(value, tuple | list):
        return bool(value) and all(isinstance(x, Tensor) for x in value)
    return isinstance(value, Tensor)


def _shrunk(shape: Sequence[int], cut: Cut) -> tuple[int, ...]:
    if not isinstance(cut, tuple):
        return tuple(shape)
    return (*shape[: cut[0]], cut[1].numel(), *shape[cut[0] + 1 :])


def _shapes(value: Any, cut: Any = None) -> Any:
    """The shape of a tensor, or those of several, after a cut."""
    if isinstance(cut, list):
        return tuple(_shapes(v, c) for v, c in zip(value, cut, strict=True) if c is not GONE)
    if isinstance(value, tuple | list):
        return tuple(map(_shapes, value))
    return _shrunk(value.shape, cut) if isinstance(value, Tensor) else None


def _equal(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and bool((compact(a) == compact(b)).all())


def _is_item(program: Program, node: fx.Node) -> bool:
    """`pieces[1]` of a chunk or split."""
    if node.target is not operator.getitem:
        return False
    return isinstance(program.values[cast(fx.Node, node.args[0])], tuple | list)


def _parent(program: Program, node: fx.Node) -> fx.Node | None:
    """The one tensor that a move moves, if there is one."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not (is_move(program, node) or _is_item(program, node)):
        return None
    return source


def _full_index(index: Any, ndim: int) -> list[Any]:
    """An item's index with the ellipsis written out."""
    items = list(index) if isinstance(index, tuple | list) else [index]
    used = sum(i is not None and i is not Ellipsis for i in items)
    if Ellipsis in [i for i in items if not isinstance(i, fx.Node | Tensor)]:
        at = next(k for k, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (ndim - used)
    else:
        items += [slice(None)] * (ndim - used)
    return items


def _entry(items: Sequence[Any], axis: int) -> int | None:
    """Which entry of a full index speaks of input axis `axis`."""
    real = [k for k, i in enumerate(items) if i is not None]
    return real[axis] if axis < len(real) else None


def insert_select(
    root: nn.Module,
    graph: fx.Graph,
    source: fx.Node,
    axis: int,
    positions: Tensor,
    name: str,
    pass_name: str,
) -> fx.Node:
    """Add index_select(source, axis, positions) at the graph's insertion point.

    Args:
        root: holds the graph's tensors; it gets the positions as a buffer `graphcomp_index_NAME`.
        graph: edited in place.
        source, axis, positions: what to pick from, int64 positions of any length.
        name: for the buffer; made unique.
        pass_name: recorded on both nodes.
    """
    buffer = _free_name(root, f"graphcomp_index_{name}")
    root.register_buffer(buffer, positions.clone())
    index = graph.create_node("get_attr", buffer)
    picked = graph.call_function(torch.index_select, (source, axis, index))
    for node in (index, picked):
        node.meta = {PASS_KEY: pass_name}
    return picked


def _free_name(module: nn.Module, name: str) -> str:
    while hasattr(module, name):
        name += "_"
    return name


def sync_attributes(module: nn.Module, before: nn.Module, width: int | None) -> None:
    """Set channel counts of a sliced module from its tensors.

    Args:
        module: sliced; changed in place.
        before: the module as it was, whose `groups` says whether it is depthwise.
        width: channels that arrive now, None if unchanged (for modules without tensors).
    """
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
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.GroupNorm) and width is not None:
        module.num_groups = module.num_channels = width
    elif isinstance(module, nn.modules.batchnorm._NormBase) and width is not None:
        module.num_features = width
