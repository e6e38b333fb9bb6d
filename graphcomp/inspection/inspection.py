"""What `graphcomp inspect` shows: the nodes of a program, its coupled channels and why they are coupled, what
is pinned and why, and what everything costs, as a record (JSON).

`inspect` gathers all facts into an `Inspection`; `text` and `drawing` only read that record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import numpy as np
from pydantic import Field
from torch import Tensor, fx, nn

from graphcomp.base import write_text
from graphcomp.channels import (
    ELEMENTS,
    Axis,
    ChannelGroup,
    Channels,
    Ints,
    JoinPolicy,
    analyse,
    compact,
    varying,
)
from graphcomp.ir import Program, describe, describe_module, input_names, op_name, output_tensors
from graphcomp.measure import products, snapshot
from graphcomp.records import LayerRow, Record


class Pin(Record):
    """Why channels must stay."""

    node: str = Field(description="node at which they are pinned")
    reason: str


class Coupling(Record):
    """A node that ties channels together."""

    node: str
    what: str = Field(description='what the node is, e.g. "add" or "conv 32->32 k3 s1 g32 (depthwise)"')


class Segment(Record):
    """Neighbouring positions along a node's channel axis that belong to one group."""

    group: int | None = Field(description="number of the group; null if no layer produces these channels")
    channels: int = Field(description="positions along the axis; after a flatten, several for each channel")
    pinned: str | None = Field(description="why they must stay; null if they may go, or nothing is there")


class NodeRow(Record):
    """One node of the graph."""

    name: str
    kind: str = Field(description='what it is, e.g. "conv 64->64 k3 s1" or "add"')
    op: str = Field(description="the same with its operands, as the printed program shows it")
    layer: str | None = Field(description="module path, or name of the tensor; null for a function")
    inputs: list[str] = Field(description="nodes that it reads")
    shape: tuple[int, ...] | None = Field(description="at batch 1; null if it does not yield one tensor")
    tensors: int = Field(description="tensors that it yields; 0 for sizes and other numbers")
    segments: list[Segment] = Field(
        description="the channel axis; empty if there is no tensor, or channels are spread over several axes"
    )


class Group(Record):
    """Coupled channels that sit on the same axes, so that a criterion chooses among them."""

    number: int = Field(description="1, 2, ... in graph order; what segments and the picture refer to")
    name: str = Field(description="the first layer that produces them; several groups may share it")
    channels: int
    producers: dict[str, int] = Field(description="layer -> how many of its outputs are in the group")
    readers: list[str] = Field(
        description="layers that read the channels; what reads a padded sum reads the sum's group"
    )
    coupled_by: list[Coupling] = Field(
        description="why they live or die together; empty if one layer is alone"
    )
    blocks: int = Field(description="every block (convolution group) must lose the same number")
    pinned: Pin | None = Field(description="null if the channels may go")
    derived: bool = Field(description="sums whose operands decide (join policy pad)")
    removable: bool = Field(description="neither pinned nor derived")
    params: int = Field(
        description="parameters that sit on the group's channels; one that sits on two groups (a row of one, "
        "a column of the other) counts for both"
    )
    macs: int = Field(
        description="multiply-accumulates of those parameters, for one sample; without those of weights that "
        "the graph computes"
    )


class PinnedReason(Record):
    """Everything that stays for one reason."""

    reason: str
    nodes: list[str]
    groups: list[int] = Field(description="numbers of the groups")
    channels: int


class Totals(Record):
    """Counters of the whole program."""

    params_trainable: int
    params_state: int = Field(description="trainable + frozen parameters and all buffers")
    macs: int = Field(description="multiply-accumulates for one sample")
    channels_removable: int = Field(description="coupled channels count once, however many layers have them")
    channels_pinned: int
    channels_derived: int


class Inspection(Record):
    """Result of `graphcomp inspect`."""

    schema_version: Literal[1] = 1
    model: str = Field(description="class name of the network")
    input_shapes: list[tuple[int, ...]]
    input_names: list[str] = Field(description="what data call them, in the same order")
    join: JoinPolicy
    nodes: list[NodeRow]
    layers: list[LayerRow]
    groups: list[Group]
    pinned: list[PinnedReason]
    totals: Totals


def inspect(program: Program, join: JoinPolicy = "couple") -> Inspection:
    """Everything that the channel analysis and the cost counters know about a program.

    Args:
        program: any Program; left as it is.
        join: policy of additions, as in `analyse`.
    """
    channels, cost = analyse(program, join), snapshot(program)
    gatherer = _Gatherer(channels)
    groups = [gatherer.group(i, group) for i, group in enumerate(channels.groups)]
    return Inspection(
        model=type(program.module).__name__,
        input_shapes=[tuple(x.shape) for x in program.example_inputs],
        input_names=input_names(program),
        join=join,
        nodes=[gatherer.node(node) for node in program.graph.nodes],
        layers=cost.layers,
        groups=groups,
        pinned=_pinned_summary(groups),
        totals=Totals(
            params_trainable=cost.params_trainable,
            params_state=cost.params_state,
            macs=cost.macs,
            channels_removable=sum(g.channels for g in groups if g.removable),
            channels_pinned=sum(g.channels for g in groups if g.pinned is not None),
            channels_derived=sum(g.channels for g in groups if g.derived and g.pinned is None),
        ),
    )


def _pinned_summary(groups: Sequence[Group]) -> list[PinnedReason]:
    """Groups by reason, the reasons in order of first appearance."""
    held: dict[str, list[tuple[Group, Pin]]] = {}
    for group in groups:
        if group.pinned is not None:
            held.setdefault(group.pinned.reason, []).append((group, group.pinned))
    return [
        PinnedReason(
            reason=reason,
            nodes=list(dict.fromkeys(pin.node for _, pin in found)),
            groups=[group.number for group, _ in found],
            channels=sum(group.channels for group, _ in found),
        )
        for reason, found in held.items()
    ]


@dataclass(frozen=True)
class _Gatherer:
    """Turns what the analysis found into records."""

    channels: Channels

    @property
    def program(self) -> Program:
        return self.channels.program

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.program.graph.nodes}

    @cached_property
    def owner(self) -> Ints:
        """Channel -> index of its group, -1 for none."""
        owner = np.full(len(self.channels.channel_of), -1, np.int64)
        for index, group in enumerate(self.channels.groups):
            owner[group.channels] = index
        return owner

    def node(self, node: fx.Node) -> NodeRow:
        """The record of one node."""
        return NodeRow(
            name=node.name,
            kind=self.kind(node),
            op=describe(self.program, node),
            layer=cast(str, node.target) if node.op in ("call_module", "get_attr") else None,
            inputs=[source.name for source in node.all_input_nodes],
            shape=self.program.shape(node),
            tensors=len(output_tensors(self.program.values[node])),
            segments=self.segments(node),
        )

    def kind(self, node: fx.Node) -> str:
        """What a node is, without its operands."""
        if node.op == "call_module":
            return describe_module(self.program.layer(cast(str, node.target)))
        fixed = {"placeholder": "input", "get_attr": "tensor", "output": "output"}
        return fixed.get(node.op) or op_name(self.program, node)

    def segments(self, node: fx.Node) -> list[Segment]:
        """The groups along the one axis on which the labels vary; dimension 1 if they vary nowhere."""
        labels = self.channels.values[node]
        if not isinstance(labels, Tensor) or not labels.ndim or len(varying(labels)) > 1:
            return []
        axis = (*varying(labels), min(1, labels.ndim - 1))[0]
        vector = compact(labels, keep=(axis,)).movedim(axis, 0).reshape(labels.size(axis))
        channels = self.channels.channel_of[vector.numpy()]
        keys = np.stack([self.owner[channels], self.reason[channels]])
        starts = np.flatnonzero((np.diff(keys, prepend=-2) != 0).any(axis=0))
        lengths = np.diff(starts, append=len(channels))
        return [
            Segment(group=group + 1 or None, channels=length, pinned=self.reasons[reason])
            for (group, reason), length in zip(keys[:, starts].T.tolist(), lengths.tolist(), strict=True)
        ]

    @cached_property
    def reasons(self) -> list[str | None]:
        """Every reason to stay; the first is none."""
        return [None, *dict.fromkeys(reason for _, reason in self.channels.pinned.values())]

    @cached_property
    def reason(self) -> Ints:
        """Channel -> index in `reasons`."""
        index = {reason: i for i, reason in enumerate(self.reasons)}
        found = np.zeros(len(self.channels.channel_of), np.int64)
        for channel, (_, reason) in self.channels.pinned.items():
            found[channel] = index[reason]
        return found

    def group(self, index: int, group: ChannelGroup) -> Group:
        """The record of one group."""
        params, macs = self.costs
        return Group(
            number=index + 1,
            name=group.name,
            channels=len(group.channels),
            producers={layer: len(rows) for layer, rows in group.producers.items()},
            readers=list(dict.fromkeys(self._layer(self.nodes[name]) for name in group.readers)),
            coupled_by=self.couplings(index, group),
            blocks=len(np.unique(group.blocks)),
            pinned=group.pinned and Pin(node=group.pinned[0], reason=group.pinned[1]),
            derived=group.derived,
            removable=group.pinned is None and not group.derived,
            params=int(params[index]),
            macs=int(macs[index]),
        )

    def _layer(self, node: fx.Node) -> str:
        return cast(str, node.target) if node.op == "call_module" else node.name

    def couplings(self, index: int, group: ChannelGroup) -> list[Coupling]:
        """Nodes where labels met, convolutions that hand labels on or tie their groups, padded joins."""
        found = {name: self.kind(self.nodes[name]) for name in group.coupled_by} | self.shared[index]
        return [Coupling(node=n, what=found[n]) for n in sorted(found, key=self.order.__getitem__)]

    @cached_property
    def order(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.nodes)}

    @cached_property
    def shared(self) -> list[dict[str, str]]:
        """Per group, the nodes that tie channels without an edge between labels, and how they do it."""
        found: list[dict[str, str]] = [{} for _ in self.channels.groups]
        ties = [(a.node, self._convolution_groups(a), a.channels) for a in self.channels.axes]
        ties += [(j.node.name, "padded", j.result) for j in self.channels.joins]
        for name, how, channels in ties:
            for index in np.unique(self.owner[channels]).tolist() if how else ():
                if index >= 0:
                    found[index][name] = f"{self.kind(self.nodes[name])} ({how})"
        return found

    def _convolution_groups(self, axis: Axis) -> str:
        """How a convolution in groups ties the channels on an axis; "" if the axis is of no such one."""
        node = self.nodes[axis.node]
        module = self.program.layer(cast(str, node.target)) if node.op == "call_module" else None
        if not isinstance(module, nn.modules.conv._ConvNd) or module.groups == 1:
            return ""
        return "depthwise" if axis.role == "norm" and module.groups == module.in_channels else "grouped"

    @cached_property
    def costs(self) -> tuple[Ints, Ints]:
        """Per group: parameters that sit on its channels, and their multiply-accumulates."""
        sites: dict[str, dict[int, Axis]] = {}
        for axis in self.channels.axes:
            for name, dim in axis.tensors:
                sites.setdefault(name, {})[dim] = axis
        tensors = {name: self.program.tensors[name] for name in sites}
        on_group = {id(t): self._elements(t, sites[name]) for name, t in tensors.items()}
        zero = np.zeros(len(self.channels.groups), np.int64)
        parameters = {id(t) for t in tensors.values() if isinstance(t, nn.Parameter)}
        params = sum((on_group[key] for key in parameters), start=zero)
        macs = zero.copy()
        for node in self.program.graph.nodes:
            for weight, count in products(self.program, node):
                if weight is not None:
                    macs += on_group.get(id(weight), zero) * (count // weight.numel())
        return params, macs

    def _elements(self, tensor: Tensor, sites: dict[int, Axis]) -> Ints:
        """Per group, the elements of a tensor that at least one of its axes gives to the group."""
        if ELEMENTS in sites:
            elements: Ints = self._counts(sites[ELEMENTS], 1)[0]
            return elements
        blocks = max(axis.groups for axis in sites.values())
        whole: Ints = np.ones((blocks, 1), np.int64)
        others: Ints = np.ones((blocks, len(self.channels.groups)), np.int64)
        for axis in sites.values():
            size = axis.channels.size // blocks
            whole = whole * size
            others = others * (size - self._counts(axis, blocks))
        inner = tensor.numel() // int(whole.sum())
        total: Ints = (whole - others).sum(axis=0) * inner
        return total

    def _counts(self, axis: Axis, blocks: int) -> Ints:
        """(blocks, groups): how many positions of an axis each group has in each convolution group."""
        width = len(self.channels.groups) + 1
        owner = self.owner[axis.channels].reshape(blocks, -1) + 1
        counts: Ints = np.zeros((blocks, width), np.int64)
        np.add.at(counts, (np.arange(blocks)[:, None], owner), 1)
        return counts[:, 1:]


def write_json(inspection: Inspection, path: str | Path) -> None:
    """Write the record (`Inspection.model_validate_json` reads it), whole or not at all; OutputError."""
    write_text(Path(path), inspection.model_dump_json(indent=1) + "\n")
