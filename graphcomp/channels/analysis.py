"""Channel provenance: which channels are coupled, found by running the graph on labels.

    producers mint labels ── data movement moves them ── readers say which label arrives at which position

Every operator does one of five things with labels, and `channels.rules` has one row an operator that says
which: it *mints* (a convolution's output), *passes* (activation, pooling), *moves* (cat, view, slice: the
operator itself runs on the labels), *couples* (an element-wise operator on several tensors: labels that meet
live or die together) or *pins* (inputs, outputs and whatever has no row: opaque is never wrong, and never
silent). Connected components of the couplings are the channels; channels on the same axes form a group.

What makes removal exact: the value at a position depends only on values of the same channel, or comes
through a reader, and readers read zero for what is removed. So dropping a channel everywhere is the same
function as writing zeros into the weights that read it (`channels.surgery`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from graphcomp.channels.labels import Ints, compact, components, varying
from graphcomp.errors import AnalysisError
from graphcomp.ir import Program

ELEMENTS = -1
"""Stands for "all dimensions" where an axis is a whole parameter or buffer (role "tensor")."""

WEIGHT_AS_TENSOR = "a layer's weight is also used as a tensor"

Role = Literal["out", "in", "norm", "tensor"]
JoinPolicy = Literal["couple", "pad"]


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis that channels sit on.

    Attributes:
        node: the first fx node that uses it.
        role: "out" (rows that produce channels), "in" (columns that read them), "norm" (per-channel
            parameters), "tensor" (a parameter or buffer used directly).
        tensors: (dotted tensor name, dimension) of everything that is sliced together.
        channels: the coupled channel at every position; of every element for role "tensor".
        groups: convolution groups; above 1, `channels` spans all groups and the tensor dimension one of them.
    """

    node: str
    role: Role
    tensors: tuple[tuple[str, int], ...]
    channels: Ints
    groups: int = 1

    @property
    def reads(self) -> bool:
        """Whether what sits behind this axis sees zeros for removed channels."""
        return self.role == "in"


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that sit on the same axes and so compete with each other.

    Attributes:
        name: the layer that produces them (the first, if several are coupled).
        channels: ids, in the order of the first producer's rows.
        producers: layer name -> rows that produce `channels`, aligned with it where a layer has one row each.
        readers: layers that read the channels.
        coupled_by: nodes at which the channels of several producers or positions were tied.
        pinned: (node, reason) if the channels must stay, else None.
        blocks: for every channel, which block of the group it is in; every block must lose the same number
            (convolution groups), so a criterion chooses inside each block.
        derived: the channels are sums of a join whose operands decide (`join="pad"`).
    """

    name: str
    channels: Ints
    producers: dict[str, Ints]
    readers: tuple[str, ...]
    coupled_by: tuple[str, ...]
    pinned: tuple[str, str] | None
    blocks: Ints
    derived: bool


@dataclass(frozen=True, eq=False)
class Join:
    """An addition whose operands keep channels of their own and are padded with zeros (`join="pad"`)."""

    node: fx.Node
    axis: int
    operands: tuple[Ints, Ints]
    result: Ints


@dataclass(frozen=True, eq=False)
class Channels:
    """The result of `analyse`.

    Attributes:
        program: what was analysed.
        join: the policy that additions were analysed under.
        axes, groups, joins: see their types.
        pinned: channel -> (node, reason), for every channel that must stay.
        channel_of: label -> channel; label 0 is no channel.
        values: node -> label tensor (or what the node yields if it is no tensor).
        balanced: (node, rows x positions of channels); every row must keep the same number of positions.
    """

    program: Program
    join: JoinPolicy
    axes: tuple[Axis, ...]
    groups: tuple[ChannelGroup, ...]
    joins: tuple[Join, ...]
    pinned: dict[int, tuple[str, str]]
    channel_of: Ints
    values: dict[fx.Node, Any]
    balanced: tuple[tuple[str, Ints], ...]

    @property
    def removable(self) -> tuple[ChannelGroup, ...]:
        """Groups that a criterion may choose from."""
        return tuple(g for g in self.groups if g.pinned is None and not g.derived)

    def group_of(self, layer: str) -> list[ChannelGroup]:
        """The groups that a layer produces channels of."""
        return [g for g in self.groups if layer in g.producers]


def analyse(program: Program, join: JoinPolicy = "couple") -> Channels:
    """Find the coupled channels of a program.

    Args:
        program: any Program.
        join: "couple" ties the operands of every addition; "pad" lets each operand of an addition keep
            channels of its own, to be padded with zeros before the addition.

    Cost: one run of the graph on labels, plus connected components of the couplings; milliseconds. What is
    computed from parameters alone gets labels only where an operator with a rule takes it: a label for every
    element of every weight would cost seconds.
    """
    from graphcomp.channels.rules import apply_rule, unfollowed

    tracker = Tracker(program, join, unfollowed(program))
    for node in program.graph.nodes:
        tracker.values[node] = apply_rule(tracker, node)
    return tracker.finish()


class Unread:
    """A parameter or buffer, or what is computed from some, that no operator has used as labels yet."""


@dataclass
class _Site:
    node: str
    role: Role
    tensors: dict[tuple[str, int], None]
    labels: Tensor
    groups: int = 1


@dataclass
class Tracker:
    """Collects what the rules find while the graph runs on labels."""

    program: Program
    join: JoinPolicy
    unfollowed: frozenset[fx.Node] = frozenset()
    values: dict[fx.Node, Any] = field(default_factory=dict)
    counts: dict[fx.Node, list[Tensor]] = field(default_factory=dict)
    entries: dict[fx.Node, tuple[list[Tensor], ...]] = field(default_factory=dict)
    count: int = 1
    edges: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    pins: list[tuple[str, str, Tensor]] = field(default_factory=list)
    sites: list[_Site] = field(default_factory=list)
    site_of: dict[tuple[int, int], int] = field(default_factory=dict)
    rectangular: list[tuple[str, Tensor]] = field(default_factory=list)
    rows: list[tuple[str, Tensor]] = field(default_factory=list)
    joins: list[tuple[fx.Node, int, Tensor, Tensor, Tensor]] = field(default_factory=list)
    frozen: set[int] = field(default_factory=set)

    def mint(self, n: int) -> Tensor:
        """n new labels."""
        self.count += n
        return torch.arange(self.count - n, self.count)

    def pin(self, node: fx.Node, labels: Tensor, reason: str) -> None:
        """These labels must stay."""
        self.pins.append((node.name, reason, compact(labels).flatten()))

    def freeze(self, source: fx.Node) -> None:
        """What is done with a parameter is not followed: all channels that sit on it must stay."""
        if source.op == "get_attr":
            self.frozen.add(id(self.program.tensors[cast(str, source.target)]))

    def couple(self, node: fx.Node, a: Tensor, b: Tensor) -> None:
        """Labels that meet (broadcast against each other) live or die together."""
        a, b = compact(a), compact(b)
        shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
        a, b = a.expand(shape), b.expand(shape)
        if a.data_ptr() != b.data_ptr() or a.shape != b.shape or a.stride() != b.stride():
            self.edges.append((node.name, a.flatten(), b.flatten()))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of the node's output; for tensors only."""
        shape = self.program.shape(node)
        if shape is None:
            raise AnalysisError(f"{node.name}: found no single tensor, expected one")
        return shape

    def labels(self, node: fx.Node) -> Tensor:
        """The label tensor of a node; a parameter or buffer gets a label per element when first asked for."""
        value = self.values[node]
        if isinstance(value, Unread):
            shape = self.shape(node)
            n = int(np.prod(shape))
            value = self.mint(n).reshape(shape) if n > 1 else torch.zeros(shape, dtype=torch.int64)
            name = cast(str, node.target)
            self.site(node, "tensor", [(name, ELEMENTS)], value)
            self.values[node] = value
        return cast(Tensor, self.values[node])

    def is_tensor(self, arg: Any) -> bool:
        """Whether an argument is a node that yields one tensor."""
        return isinstance(arg, fx.Node) and isinstance(self.values[arg], Tensor | Unread)

    def site(
        self, node: fx.Node, role: Role, tensors: Sequence[tuple[str, int]], labels: Tensor, groups: int = 1
    ) -> None:
        """Labels sit on these tensor dimensions; a dimension seen before couples old labels with new."""
        keys = {(id(self.program.tensors[name]), dim): (name, dim) for name, dim in tensors}
        old = {self.site_of[k] for k in keys if k in self.site_of}
        index = min(old) if old else len(self.sites)
        if not old:
            self.sites.append(_Site(node.name, role, {}, labels, groups))
        for i in old:
            self.couple(node, self.sites[i].labels, labels)
        for key, tensor in keys.items():
            if key not in self.site_of:
                self.sites[index].tensors[tensor] = None
                self.site_of[key] = index

    def known_rows(self, name: str, dim: int) -> Tensor | None:
        """Labels minted before for the output rows of this tensor (a layer that is called twice)."""
        index = self.site_of.get((id(self.program.tensors[name]), dim))
        return None if index is None else self.sites[index].labels

    def vector(self, node: fx.Node, labels: Tensor, axis: int) -> Tensor:
        """The labels along one axis, all others coupled to them: for what works on whole channels."""
        rest = compact(labels, keep=(axis,)).movedim(axis, 0).reshape(labels.size(axis), -1)
        if rest.size(1) > 1:
            self.couple(node, rest[:, :1], rest[:, 1:])
        return rest[:, 0]

    def stand_in(self, node: fx.Node, n: int, reason: str) -> Tensor:
        """n labels that stay, for an axis of a layer that works beside the channels."""
        labels = self.mint(n)
        self.pin(node, labels, reason)
        return labels

    def needs_rectangle(self, node: fx.Node, labels: Tensor) -> None:
        """An operator that computes needs its operand whole: only hyperplanes of it can be removed."""
        if len(varying(labels)) > 1:
            self.rectangular.append((node.name, compact(labels)))

    # ------------------------------------------------------------------ from labels to channels

    def finish(self) -> Channels:
        """Connected components, then groups."""
        channel_of, edges = self._components()
        pinned = self._pinned(channel_of)
        axes = tuple(
            Axis(s.node, s.role, tuple(s.tensors), channel_of[s.labels.numpy()], s.groups) for s in self.sites
        )
        joins = tuple(
            Join(n, axis, (channel_of[a.numpy()], channel_of[b.numpy()]), channel_of[out.numpy()])
            for n, axis, a, b, out in self.joins
        )
        self._pin_unproduced(axes, joins, channel_of, pinned)
        balanced = tuple((node, channel_of[rows.numpy()]) for node, rows in self.rows)
        return Channels(
            program=self.program,
            join=self.join,
            axes=axes,
            groups=_groups(axes, joins, pinned, channel_of, edges, balanced),
            joins=joins,
            pinned=pinned,
            channel_of=channel_of,
            values=self.values,
            balanced=balanced,
        )

    def _components(self) -> tuple[Ints, list[tuple[str, Ints]]]:
        edges = [(node, a.numpy(), b.numpy()) for node, a, b in self.edges]
        while True:
            a = np.concatenate([e[1] for e in edges] or [np.zeros(0, np.int64)])
            b = np.concatenate([e[2] for e in edges] or [np.zeros(0, np.int64)])
            channel_of = components(self.count, a, b)
            more = [e for node, labels in self.rectangular for e in _ties(node, channel_of[labels.numpy()])]
            if not more:
                return channel_of, [(node, channel_of[ends]) for node, ends, _ in edges]
            edges += more

    def _pinned(self, channel_of: Ints) -> dict[int, tuple[str, str]]:
        pinned: dict[int, tuple[str, str]] = {}
        whole = {tensor for tensor, dim in self.site_of if dim == ELEMENTS}
        for (tensor, _), index in self.site_of.items():
            if tensor in whole and len([k for k in self.site_of if k[0] == tensor]) > 1:
                site = self.sites[index]
                self.pins.append((site.node, WEIGHT_AS_TENSOR, site.labels.flatten()))
        for (tensor, _), index in self.site_of.items():
            if tensor in self.frozen:
                site = self.sites[index]
                self.pins.append((site.node, WEIGHT_AS_TENSOR, site.labels.flatten()))
        for node, reason, labels in self.pins:
            for channel in np.unique(channel_of[labels.numpy()]).tolist():
                if channel:
                    pinned.setdefault(channel, (node, reason))
        return pinned

    def _pin_unproduced(
        self,
        axes: Iterable[Axis],
        joins: Iterable[Join],
        channel_of: Ints,
        pinned: dict[int, tuple[str, str]],
    ) -> None:
        """Channels that no layer produces have nothing to score; a join's operands decide its sums."""
        size = len(channel_of)
        made, summed = np.zeros(size, bool), np.zeros(size, bool)
        for axis in axes:
            if axis.role == "out":
                made[axis.channels] = True
        for join in joins:
            summed[join.result] = True
        for axis in axes:
            if not (made | summed)[axis.channels].all():
                for channel in np.unique(axis.channels[~(made | summed)[axis.channels]]).tolist():
                    if channel:
                        pinned.setdefault(channel, (axis.node, "no layer produces these channels"))
        for channel in np.flatnonzero(made & summed).tolist():
            pinned.setdefault(
                channel, ("join", "a sum that is padded is coupled with a layer's own channels")
            )


def _ties(node: str, channels: Ints) -> list[tuple[str, Ints, Ints]]:
    """Edges that leave only hyperplanes of one axis apart: the longest, of equals the innermost-counting."""
    varies = [d for d in range(channels.ndim) if (channels != channels.take([0], axis=d)).any()]
    if len(varies) < 2:
        return []
    step = {d: int(abs(np.diff(channels.take([0, 1], axis=d), axis=d).flat[0])) for d in varies}
    axis = max(varies, key=lambda d: (channels.shape[d], -step[d]))
    flat = np.moveaxis(channels, axis, 0).reshape(channels.shape[axis], -1)
    first = np.broadcast_to(flat[:, :1], flat.shape)
    return [(node, first.flatten(), flat.flatten())]


def _groups(
    axes: Sequence[Axis],
    joins: Sequence[Join],
    pinned: dict[int, tuple[str, str]],
    channel_of: Ints,
    edges: Sequence[tuple[str, Ints]],
    balanced: Sequence[tuple[str, Ints]],
) -> tuple[ChannelGroup, ...]:
    """Channels with the same set of axes (and the same reason to stay) form a group."""
    size = len(channel_of)
    random = np.random.default_rng(0)
    signature = np.zeros(size, np.uint64)
    for axis in axes:
        signature[np.unique(axis.channels)] ^= random.integers(1, 2**63, dtype=np.uint64)
    reasons = {r: random.integers(1, 2**63, dtype=np.uint64) for r in dict.fromkeys(pinned.values())}
    for channel, reason in pinned.items():
        signature[channel] ^= reasons[reason]
    produced = [a.channels for a in axes if a.role == "out"]
    derived = np.zeros(size, bool)
    for join in joins:
        derived[join.result] = True
    candidates = np.concatenate([*produced, *(j.result for j in joins)] or [np.zeros(0, np.int64)])
    members = candidates[np.sort(np.unique(candidates, return_index=True)[1])]
    members = members[members != 0]
    _, first, inverse = np.unique(signature[members], return_index=True, return_inverse=True)
    group_of = np.full(size, -1, np.int64)
    group_of[members] = np.argsort(np.argsort(first))[inverse]
    tied = _by_group(((node, ends) for node, ends in edges), group_of, len(first))
    readers = _by_group(((a.node, a.channels) for a in axes if a.role == "in"), group_of, len(first))
    producers: list[dict[str, Ints]] = [{} for _ in first]
    for axis in axes:
        if axis.role == "out":
            owner = group_of[axis.channels]
            for g in np.unique(owner[owner >= 0]).tolist():
                producers[g][layer_name(axis)] = np.flatnonzero(owner == g)
    order = np.argsort(group_of[members], kind="stable")
    ends = np.cumsum(np.bincount(group_of[members], minlength=len(first)))
    rows = _row_signature(size, balanced)
    return tuple(
        ChannelGroup(
            name=next(iter(producers[g]), None) or (tied[g] or readers[g] or ["join"])[0],
            channels=block,
            producers=producers[g],
            readers=tuple(readers[g]),
            coupled_by=tuple(tied[g]),
            pinned=pinned.get(int(block[0])),
            blocks=np.unique(rows[block], return_inverse=True)[1],
            derived=bool(derived[block[0]]) and not producers[g],
        )
        for g, block in enumerate(np.split(members[order], ends[:-1]))
        if len(block)
    )


def _row_signature(size: int, balanced: Sequence[tuple[str, Ints]]) -> NDArray[np.uint64]:
    """Channels that are in the same row of every balanced set have the same number."""
    random = np.random.default_rng(1)
    signature = np.zeros(size, np.uint64)
    for _, rows in balanced:
        for row in rows:
            signature[np.unique(row)] ^= random.integers(1, 2**63, dtype=np.uint64)
    return signature


def _by_group(items: Iterable[tuple[str, Ints]], group_of: Ints, count: int) -> list[list[str]]:
    found: list[dict[str, None]] = [{} for _ in range(count)]
    for name, channels in items:
        for g in np.unique(group_of[channels]).tolist():
            if g >= 0:
                found[g][name] = None
    return [list(names) for names in found]


def layer_name(axis: Axis) -> str:
    """The dotted path of the layer that owns an axis."""
    return axis.tensors[0][0].rpartition(".")[0] or axis.tensors[0][0]
