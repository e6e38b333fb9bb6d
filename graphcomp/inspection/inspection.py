"""What `graphcomp inspect` shows: the nodes of a program, its coupled channels and why they are coupled, what
is pinned and why, and what everything costs; as a record (JSON), as tables, and as a picture.

`inspect` gathers all facts into an `Inspection`; everything else here only reads that record.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Literal, cast
from xml.etree import ElementTree as ET

import numpy as np
from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, fx, nn

from graphcomp.base import write_text
from graphcomp.channels import (
    CONCATENATIONS,
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
from graphcomp.inspection.characters import legal
from graphcomp.ir import Program, describe, describe_module, op_name, output_tensors
from graphcomp.measure import layer_row, snapshot
from graphcomp.records import LayerRow, Record

# ---- the record ------------------------------------------------------------------------------------------


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
    join: JoinPolicy
    nodes: list[NodeRow]
    layers: list[LayerRow]
    groups: list[Group]
    pinned: list[PinnedReason]
    totals: Totals


# ---- gathering -------------------------------------------------------------------------------------------


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
            row, weight = layer_row(self.program, node), self._weight(node)
            if row is not None and weight is not None:
                macs += on_group.get(id(weight), zero) * (row.macs // weight.numel())
        return params, macs

    def _weight(self, node: fx.Node) -> Tensor | None:
        """The stored weight of a layer; None if there is none, or the graph computes it."""
        if node.op == "call_module":
            return self.program.tensors.get(f"{node.target}.weight")
        source = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        stored = isinstance(source, fx.Node) and source.op == "get_attr"
        return self.program.tensors[cast(str, cast(fx.Node, source).target)] if stored else None

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


# ---- text ------------------------------------------------------------------------------------------------


def render(inspection: Inspection, console: Console) -> None:
    """Print the groups in graph order, what is pinned by reason, and the totals; 100 columns are enough."""
    console.print(_groups_table(inspection, min(console.width, 120)))
    if inspection.pinned:
        console.print(_pinned_table(inspection))
    console.print(Text(_totals(inspection)))


def _groups_table(inspection: Inspection, width: int) -> Table:
    caption = "params, MACs: what sits on the group's channels; a weight between two groups counts for both"
    table = Table(
        title=Text(f"{inspection.model}: coupled channels"),
        caption=Text(caption, style="dim"),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        width=width,
    )
    for name in ("#", "channels", "params", "MACs"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, ratio in (("made by", 5), ("read by", 4), ("why", 5)):
        table.add_column(name, overflow="fold", ratio=ratio)
    total = inspection.totals
    for group in inspection.groups:
        producers = [layer + _tied(group, layer) for layer in group.producers]
        table.add_row(
            str(group.number),
            str(group.channels),
            _percent(group.params, total.params_trainable),
            _percent(group.macs, total.macs),
            Text(_some(producers) or "(sum)"),
            Text(_some([_tail(layer, 20) for layer in group.readers], 1)),
            Text(_why(group), style="bold" if group.pinned else ""),
        )
    return table


def _pinned_table(inspection: Inspection) -> Table:
    table = Table(title=Text("pinned: these channels stay"), box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("reason", overflow="fold")
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("groups", overflow="fold")
    table.add_column("at", overflow="fold")
    name = {group.number: group.name for group in inspection.groups}
    for row in inspection.pinned:
        groups = [f"#{number} {name[number]}" for number in row.groups]
        table.add_row(Text(row.reason), str(row.channels), Text(_some(groups)), Text(_some(row.nodes)))
    return table


def _totals(inspection: Inspection) -> str:
    total = inspection.totals
    removable = sum(group.removable for group in inspection.groups)
    derived = f", {total.channels_derived} sums of padded joins" if total.channels_derived else ""
    return (
        f"{total.params_trainable:,} trainable params ({total.params_state:,} with buffers), "
        f"{total.macs:,} MACs a sample\n"
        f"{total.channels_removable:,} channels removable in {_count(removable, 'group')}, "
        f"{total.channels_pinned:,} pinned{derived}"
    )


def _why(group: Group) -> str:
    if group.pinned is not None:
        return f"pinned: {group.pinned.reason} at {group.pinned.node}"
    nodes = _coupling_nodes(group)
    return _coupled(group) + _some(nodes) if nodes else "alone"


def _tied(group: Group, layer: str) -> str:
    """How many outputs of a layer its channels are, where it is not one each."""
    outputs = group.producers.get(layer, group.channels)
    return "" if outputs == group.channels else f" ({outputs:,} outputs)"


def _coupled(group: Group) -> str:
    return "sum at " if group.derived else "coupled by "


def _coupling_nodes(group: Group) -> list[str]:
    """The nodes that couple a group, each with a word on what it is where its name does not say so."""
    found = []
    for coupling in group.coupled_by:
        tail = re.search(r"\((\w+)\)$", coupling.what)
        word = tail[1] if tail else coupling.what.split()[0]
        found.append(coupling.node if coupling.node.startswith(word) else f"{coupling.node} ({word})")
    return found


def _some(names: Sequence[str], most: int = 2) -> str:
    """The first names of a list and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" +{more} more" if more > 0 else "")


def _fitting(names: Sequence[str], width: int) -> str:
    """As many names as `width` characters take (one at least), and how many more there are."""
    fits = [most for most in range(1, len(names) + 1) if len(_some(names, most)) <= width]
    return _some(names, max(fits, default=1))


def _cut(text: str, most: int) -> str:
    """The beginning of a long text."""
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _tail(path: str, most: int) -> str:
    """The end of a long module path, where paths differ; cut at a dot if there is one."""
    if len(path) <= most:
        return path
    end = path[1 - most :]
    whole = end.partition(".")[2]
    return "\N{HORIZONTAL ELLIPSIS}" + (whole if 2 * len(whole) > most else end)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


# ---- files -----------------------------------------------------------------------------------------------


def write_json(inspection: Inspection, path: str | Path) -> None:
    """Write the record (`Inspection.model_validate_json` reads it), whole or not at all; OutputError."""
    write_text(Path(path), inspection.model_dump_json(indent=1) + "\n")


def write_svg(inspection: Inspection, path: str | Path) -> None:
    """Draw the network with its groups as one self-contained SVG file, whole or not at all; OutputError.

    Top to bottom, a row for every layer, join and rearrangement of channels; nodes that leave the channels as
    they are (normalisation, activation, pooling) are named in the row of the node they follow. A row's bar is
    its output's channel axis: as long as the cube root of the width, coloured by group.
    """
    svg = _Drawing(inspection).draw()
    ET.indent(svg, " ")
    write_text(Path(path), ET.tostring(svg, encoding="unicode") + "\n")


# ---- picture: what goes where ----------------------------------------------------------------------------


@dataclass
class _Row:
    """One line of the picture."""

    node: NodeRow
    index: int
    sources: list[int]
    folded: list[NodeRow] = field(default_factory=list)


def _rows(inspection: Inspection) -> list[_Row]:
    """The nodes that deserve a row; every other node is folded into the row whose value it hands on."""
    coupling = {c.node for group in inspection.groups for c in group.coupled_by}
    layers = {row.name for row in inspection.layers}
    rows: list[_Row] = []
    row_of: dict[str, int] = {}
    for node in inspection.nodes:
        sources = sorted({row_of[name] for name in node.inputs if name in row_of})
        if node.kind == "tensor" or not (node.tensors or node.kind == "output"):
            continue
        own = node.name in coupling or bool({node.layer, node.name} & layers) or node.kind in _ALWAYS
        if own or len(sources) != 1 or _mixes(node, rows[sources[0]].node):
            rows.append(_Row(node, len(rows), sources))
            row_of[node.name] = len(rows) - 1
        else:
            rows[sources[0]].folded.append(node)
            row_of[node.name] = sources[0]
    return rows


_ALWAYS = {"input", "output", "stack", *CONCATENATIONS}


def _mixes(node: NodeRow, row: NodeRow) -> bool:
    """Whether a node's channels are others, or in another order, than those of the row it follows."""
    return bool(node.segments) and _proportions(node.segments) != _proportions(row.segments)


def _proportions(segments: Sequence[Segment]) -> list[tuple[int | None, str | None, int]]:
    unit = math.gcd(*(s.channels for s in segments))
    return [(s.group, s.pinned, s.channels // unit) for s in segments]


@dataclass(frozen=True)
class _Skip:
    """A value that is read further down than in the next row."""

    source: int
    readers: list[int]


def _skips(rows: Sequence[_Row]) -> list[_Skip]:
    readers: dict[int, list[int]] = {}
    for row in rows:
        for source in row.sources:
            if source != row.index - 1:
                readers.setdefault(source, []).append(row.index)
    return [_Skip(source, found) for source, found in readers.items()]


def _lanes(skips: Sequence[_Skip]) -> dict[int, int]:
    """Source row -> lane, so that no two skips share a stretch of one; short ones get the inner lanes."""
    taken: list[list[tuple[int, int]]] = []
    lane_of: dict[int, int] = {}
    for skip in sorted(skips, key=lambda s: (s.readers[-1] - s.source, s.source)):
        start, end = skip.source, skip.readers[-1]
        free = (i for i, lane in enumerate(taken) if all(end <= a or b <= start for a, b in lane))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((start, end))
        lane_of[start] = lane
    return lane_of


# ---- picture: colours ------------------------------------------------------------------------------------

# Paul Tol's "muted" and "light" schemes: distinct for every kind of colour vision. Both counts are odd, so
# that layers which take turns (as in a dense block) do not share the same few colours.
_COUPLED = "#332288 #CC6677 #44AA99 #DDCC77 #882255 #88CCEE #117733 #AA4499 #999933".split()
_ALONE = "#77AADD #EE8866 #BBCC33 #FFAABB #44BB99 #EEDD88 #99DDFF".split()
_PINNED, _NONE, _INK, _FAINT = "#C4C9D1", "#FFFFFF", "#1F2430", "#667085"


def _palette(groups: Sequence[Group]) -> dict[int | None, tuple[str, str]]:
    """Group number -> (fill of its bars, colour of its lines): strong if coupled, pale if alone."""
    colours: dict[int | None, tuple[str, str]] = {}
    used = {True: 0, False: 0}
    for group in groups:
        if group.pinned is not None:
            colours[group.number] = (_PINNED, _FAINT)
            continue
        coupled = bool(group.coupled_by)
        scheme = _COUPLED if coupled else _ALONE
        colour = scheme[used[coupled] % len(scheme)]
        used[coupled] += 1
        pair = (colour, colour) if coupled else (_pale(colour), _mixed(colour, _INK, 0.2))
        colours[group.number] = pair
    return colours


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _mixed(colour: str, other: str, share: float) -> str:
    pairs = zip(_channels(colour), _channels(other), strict=True)
    return "#" + "".join(f"{round((1 - share) * a + share * b):02X}" for a, b in pairs)


def _pale(colour: str) -> str:
    return _mixed(colour, "#FFFFFF", 0.35)


def _ink_on(colour: str) -> str:
    red, green, blue = _channels(colour)
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#FFFFFF"


# ---- picture: drawing ------------------------------------------------------------------------------------

_TOP, _PITCH, _BAR, _MARGIN, _LANE = 136.0, 38.0, 20.0, 24.0, 9.0
_BAR_WIDTH, _TEXT_WIDTH, _LEGEND_WIDTH, _CORNER = 220.0, 340.0, 420.0, 6.0
_MOST_STRIPES, _SUBTITLE_CHARS, _LEGEND_CHARS = 48, 58, 68

_STYLE = f"""
text {{ font-family: Inter, 'Segoe UI', Roboto, Arial, 'DejaVu Sans', sans-serif; fill: {_INK} }}
.title {{ font-size: 20px; font-weight: 700 }}
.name {{ font-size: 12.5px; font-weight: 600 }}
.key {{ stroke: #98A2B3; stroke-width: .6 }}
.small {{ font-size: 11px; fill: {_FAINT} }}
.pin {{ font-weight: 600; fill: {_INK} }}
.chip {{ font-size: 10.5px; font-weight: 700; text-anchor: middle; pointer-events: none }}
.box {{ fill: none; stroke: #475467; stroke-width: .8 }}
.empty {{ stroke-dasharray: 3 2 }}
.line {{ fill: none; stroke-width: 1.7 }}
.hit {{ fill: #FFFFFF }}
.row:hover .hit {{ fill: #F2F4F7 }}
"""


def _add(parent: ET.Element, tag: str, text: str = "", **attributes: str | float) -> ET.Element:
    """A child element; `_` in a name stands for `-`, and a trailing one is dropped."""
    shown = {
        key.rstrip("_").replace("_", "-"): f"{value:g}" if isinstance(value, float) else legal(str(value))
        for key, value in attributes.items()
    }
    child = ET.SubElement(parent, tag, shown)
    child.text = legal(text) or None
    return child


def _arrow(text: str) -> str:
    return text.replace("->", " \N{RIGHTWARDS ARROW} ")


@dataclass(frozen=True)
class _Drawing:
    """The picture of an inspection. Lanes, bars, texts and legend stand side by side, left to right."""

    inspection: Inspection

    @cached_property
    def rows(self) -> list[_Row]:
        return _rows(self.inspection)

    @cached_property
    def groups(self) -> dict[int | None, Group]:
        return {group.number: group for group in self.inspection.groups}

    @cached_property
    def colours(self) -> dict[int | None, tuple[str, str]]:
        return _palette(self.inspection.groups)

    @cached_property
    def layers(self) -> dict[str, LayerRow]:
        return {row.name: row for row in self.inspection.layers}

    @cached_property
    def lanes(self) -> dict[int, int]:
        return _lanes(_skips(self.rows))

    @cached_property
    def left(self) -> float:
        """Where bars begin."""
        return _MARGIN + 20 + _LANE * (max(self.lanes.values(), default=-1) + 1)

    @cached_property
    def widest(self) -> int:
        return max((sum(s.channels for s in row.node.segments) for row in self.rows), default=1)

    def y(self, index: int) -> float:
        """Top of a row's bar."""
        return _TOP + _PITCH * index

    def draw(self) -> ET.Element:
        """The whole picture."""
        text_at = self.left + _BAR_WIDTH + 52
        legend_at = text_at + _TEXT_WIDTH + 24
        svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img"})
        _add(svg, "title", f"{self.inspection.model}: coupled channels")
        _add(svg, "style", _STYLE + self._highlights())
        self._hatch(svg)
        background = _add(svg, "rect", width="100%", height="100%", fill="#FFFFFF")
        self._header(svg)
        rows = _add(svg, "g")
        for row in self.rows:
            self._row(rows, row, text_at)
        self._spine(svg)
        for skip in _skips(self.rows):
            self._skip(svg, skip)
        bottom = self._legend(svg, legend_at)
        width = legend_at + _LEGEND_WIDTH + _MARGIN
        height = max(bottom, self.y(len(self.rows))) + _MARGIN
        svg.attrib |= {"width": f"{width:g}", "height": f"{height:g}", "viewBox": f"0 0 {width:g} {height:g}"}
        background.attrib |= {"width": f"{width:g}", "height": f"{height:g}"}
        return svg

    def _highlights(self) -> str:
        """Pointing at a group dims all others: style sheets can do that, so there is no script."""
        return "".join(
            f"svg:has(.g{n}:hover) .of:not(.g{n}) {{ opacity: .12 }}\n" for n in self.groups if n is not None
        )

    def _hatch(self, svg: ET.Element) -> None:
        turned = {"patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"}
        pattern = _add(_add(svg, "defs"), "pattern", id="pinned", width=6.0, height=6.0, **turned)
        _add(pattern, "rect", width=6.0, height=6.0, fill=_PINNED)
        _add(pattern, "rect", width=2.0, height=6.0, fill="#9AA2AE")

    def _header(self, svg: ET.Element) -> None:
        inputs = ", ".join("x".join(map(str, shape)) for shape in self.inspection.input_shapes)
        _add(svg, "text", f"{self.inspection.model} ({inputs})", x=_MARGIN, y=34.0, class_="title")
        for i, line in enumerate(_totals(self.inspection).splitlines()):
            _add(svg, "text", line, x=_MARGIN, y=54.0 + 16 * i, class_="small")
        x = _MARGIN
        for fill, text in (
            (_COUPLED[0], "coupled layers: same colour, same number"),
            (_pale(_ALONE[0]), "a layer of its own"),
            ("url(#pinned)", "pinned"),
            (_NONE, "of no layer, or not on one axis"),
        ):
            _add(svg, "rect", x=x, y=82.0, width=18.0, height=12.0, rx=2.0, fill=fill, class_="key")
            _add(svg, "text", text, x=x + 24, y=92.0, class_="small")
            x += 44 + 5.7 * len(text)
        _add(svg, "text", "bar length: cube root of the channels", x=x, y=92.0, class_="small")

    # -- rows

    def _row(self, parent: ET.Element, row: _Row, text_at: float) -> None:
        g, y = _add(parent, "g", class_="row", data_node=row.node.name), self.y(row.index)
        _add(g, "title", self._details(row))
        width = text_at + _TEXT_WIDTH - self.left
        _add(g, "rect", class_="hit", x=self.left - 4, y=y - 9, width=width, height=_PITCH, rx=4.0)
        end = self._bar(g, row.node, y)
        count = sum(s.channels for s in row.node.segments)
        if count:
            _add(g, "text", str(count), x=end + 6, y=y + 14, class_="small")
        name = row.node.layer or row.node.name
        _add(g, "text", _tail(name, 38), x=text_at, y=y + 7, class_="name")
        if row.node.shape is not None:
            shape = "x".join(map(str, row.node.shape[1:]))
            _add(g, "text", shape, x=text_at + _TEXT_WIDTH - 8, y=y + 7, class_="small", text_anchor="end")
        subtitle, reason = self._subtitle(row), next((s.pinned for s in row.node.segments if s.pinned), None)
        line = _add(g, "text", subtitle, x=text_at, y=y + 22, class_="small")
        if reason:
            shown = _cut(f"pinned: {reason}", max(_SUBTITLE_CHARS - len(subtitle), 20))
            _add(line, "tspan", shown, dx=8.0, class_="pin")

    def _subtitle(self, row: _Row) -> str:
        """What the row is and, where there is room, what follows it."""
        if row.node.kind == "output":
            return ""
        pinned = any(s.pinned for s in row.node.segments)
        words = [_BATCHNORM.sub("bn", node.kind.split()[0]) for node in row.folded if not pinned]
        kinds = [_arrow(row.node.kind), *(word for word, _ in groupby(words))]
        return ", ".join(kinds[:5] + ["\N{HORIZONTAL ELLIPSIS}"] * (len(kinds) > 5))

    def _bar(self, g: ET.Element, node: NodeRow, y: float) -> float:
        """Draws the segments; returns where the bar ends."""
        total = sum(s.channels for s in node.segments)
        length = max(26.0, _BAR_WIDTH * math.cbrt(total / self.widest)) if total else 26.0
        x = self.left
        for segment in _stripes(node.segments):
            width = length * segment.channels / total
            self._segment(g, segment, x, y, width)
            x += width
        frame = "box" if total else "box empty"
        _add(g, "rect", class_=frame, x=self.left, y=y, width=length, height=_BAR, rx=1.5)
        return self.left + length

    def _segment(self, g: ET.Element, segment: Segment, x: float, y: float, width: float) -> None:
        fill = "url(#pinned)" if segment.pinned else self.colours.get(segment.group, (_NONE, _FAINT))[0]
        _add(g, "rect", class_=self._class(segment.group), x=x, y=y, width=width, height=_BAR, fill=fill)
        if segment.group is not None and width >= 7.0 * len(str(segment.group)) + 3:
            ink = _INK if segment.pinned else _ink_on(fill)
            _add(g, "text", str(segment.group), x=x + width / 2, y=y + 14, class_="chip", style=f"fill:{ink}")

    def _class(self, group: int | None) -> str:
        return "of" if group is None else f"of g{group}"

    def _details(self, row: _Row) -> str:
        """What hovering shows."""
        node, layer = row.node, self.layers.get(row.node.layer or row.node.name)
        lines = [f"{node.layer or node.name}: {node.op}"]
        lines += [f"then {f.name}: {f.op}" for f in row.folded]
        if layer is not None:
            lines.append(f"{layer.params:,} params, {layer.macs:,} MACs a sample")
        counts: dict[int | None, int] = {}
        for segment in node.segments:
            counts[segment.group] = counts.get(segment.group, 0) + segment.channels
        for number, count in counts.items():
            group = self.groups.get(number)
            lines.append(f"{count} of " + (f"{_headline(group)}: {_why(group)}" if group else "no layer"))
        lines += [f"pinned: {reason}" for reason in dict.fromkeys(s.pinned for s in node.segments) if reason]
        return "\n".join(lines)

    # -- lines

    def _line_colour(self, index: int) -> tuple[str, str]:
        """(colour, class) of lines that carry a row's value."""
        groups = {segment.group for segment in self.rows[index].node.segments}
        group = groups.pop() if len(groups) == 1 else None
        return self.colours.get(group, (_NONE, _FAINT))[1], self._class(group)

    def _spine(self, svg: ET.Element) -> None:
        """Lines from a row to the next one."""
        for row in self.rows:
            if row.index - 1 in row.sources:
                colour, kind = self._line_colour(row.index - 1)
                x, start, end = self.left + 13, self.y(row.index - 1) + _BAR, self.y(row.index)
                _add(svg, "path", class_=f"line {kind}", stroke=colour, d=f"M{x:g} {start:g}V{end - 4:g}")
                _add(svg, "path", class_=kind, fill=colour, d=f"M{x:g} {end:g}l-4 -6h8z")

    def _skip(self, svg: ET.Element, skip: _Skip) -> None:
        """One line down a lane, turning off to every reader."""
        colour, kind = self._line_colour(skip.source)
        lane = self.left - 20 - _LANE * self.lanes[skip.source]
        r, ends = _CORNER, [self._entry(reader, skip.source) for reader in skip.readers]
        y = self.y(skip.source) + _BAR - 4
        path = f"M{self.left:g} {y:g}H{lane + r:g}q{-r:g} 0 {-r:g} {r:g}V{ends[-1] - r:g}"
        turns = [f"M{lane:g} {end - r:g}q0 {r:g} {r:g} {r:g}H{self.left - 5:g}" for end in ends]
        _add(svg, "path", class_=f"line {kind}", stroke=colour, d=path + "".join(turns))
        heads = "".join(f"M{self.left:g} {end:g}l-6 -4v8z" for end in ends)
        _add(svg, "path", class_=kind, fill=colour, d=heads)

    def _entry(self, reader: int, source: int) -> float:
        """Height at which a skip enters a row: inner lanes above outer ones, so that ends do not cross."""
        lanes = sorted(self.lanes[s] for s in self.rows[reader].sources if s != reader - 1)
        return self.y(reader) + 12 * (lanes.index(self.lanes[source]) + 1) / (len(lanes) + 1)

    # -- legend

    def _legend(self, svg: ET.Element, x: float) -> float:
        """The list of groups; returns where it ends."""
        y = _TOP
        _add(svg, "text", _count(len(self.groups), "group"), x=x, y=y - 14, class_="name")
        for group in self.inspection.groups:
            g = _add(svg, "g", class_="row")
            _add(g, "title", "\n".join(_full(group)))
            fill = "url(#pinned)" if group.pinned else self.colours[group.number][0]
            ink = _INK if group.pinned else _ink_on(fill)
            kind = self._class(group.number)
            _add(g, "rect", class_=kind, x=x, y=y, width=30.0, height=18.0, rx=2.0, fill=fill)
            _add(g, "text", str(group.number), x=x + 15, y=y + 13, class_="chip", style=f"fill:{ink}")
            _add(g, "text", _tail(group.name, 48), x=x + 40, y=y + 9, class_="name")
            for i, line in enumerate(_lines(group)):
                _add(g, "text", line, x=x + 40, y=y + 24 + 14 * i, class_="small")
            y += 34 + 14 * (len(_lines(group)) - 1)
        return y


_BATCHNORM = re.compile(r"batchnorm[123]d")


def _stripes(segments: Sequence[Segment]) -> Iterator[Segment]:
    """The segments as they are or, if they would be too thin to see, one for each group."""
    if len(segments) <= _MOST_STRIPES:
        yield from segments
        return
    counts: dict[tuple[int | None, str | None], int] = {}
    for s in segments:
        counts[s.group, s.pinned] = counts.get((s.group, s.pinned), 0) + s.channels
    for (group, pinned), count in counts.items():
        yield Segment(group=group, channels=count, pinned=pinned)


def _headline(group: Group) -> str:
    return f"group {group.number} {group.name} ({_count(group.channels, 'channel')})"


def _lines(group: Group) -> list[str]:
    """A group in the legend, below its name."""
    others, nodes = [layer for layer in group.producers if layer != group.name], _coupling_nodes(group)
    first = _count(group.channels, "channel") + _tied(group, group.name)
    lines = [first + (f" with {_fitting(others, _LEGEND_CHARS - len(first) - 6)}" if others else "")]
    if nodes:
        lines.append(_coupled(group) + _fitting(nodes, _LEGEND_CHARS - 11))
    if group.pinned is not None:
        lines.append(f"pinned: {group.pinned.reason} at {group.pinned.node}")
    return [_cut(line, _LEGEND_CHARS) for line in lines]


def _full(group: Group) -> list[str]:
    """A group with nothing left out."""
    return [
        _headline(group),
        "made by " + ", ".join(f"{layer} ({count})" for layer, count in group.producers.items()),
        "read by " + (", ".join(group.readers) or "no layer"),
        *(f"coupled by {c.node}: {c.what}" for c in group.coupled_by),
        *([f"pinned: {group.pinned.reason} at {group.pinned.node}"] if group.pinned else []),
        f"{group.params:,} params and {group.macs:,} MACs a sample sit on these channels",
    ]
