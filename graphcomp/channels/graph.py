"""Coupled channels as a graph of networkx: who makes them, who reads them, and where they are tied."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor, fx

from graphcomp.channels.labels import Ints, compact
from graphcomp.channels.model import Axis, Channels, Role
from graphcomp.ir import op_name

if TYPE_CHECKING:
    import networkx as nx

_REASONS: dict[Role, str] = {
    "in": "reads them",
    "norm": "has parameters for each of them",
    "tensor": "is a tensor that they sit on",
}


def to_networkx(channels: Channels) -> "nx.MultiDiGraph":
    """Who makes channels, who must follow when they go, and why, for networkx.

    Attributes are str and int, as every writer of networkx takes them; what does not apply is left out.
    Nodes have the names that they have in `Program.to_networkx()`. Groups are numbered 1, 2, ... in the
    order of `groups`.

    Graph: `model`, class name of the network; `join`, the policy of additions.

    Nodes, in the order in which they run:
        what: "layer"; "join" for what ties channels of several without weights of its own; "tensor" for
            a parameter or buffer; "input".
        operator: the name of the operator (`ir.operators`).
        layer: module path, or name of the tensor.
        groups: numbers of the groups whose channels it makes, as in "1,3".
        pinned: why they must stay: "node: reason", several with "; " between them.
    Edges, from who makes channels to each layer that sits on them and each node that ties them; one a
    group:
        group, name: number and name of the group.
        channels: labels that arrive; those that are tied count each.
        reason: "reads them", "ties them: add", ...; several with "; " between them.
        pinned_at, pinned: the node that holds the group, and why.
    """
    import networkx as nx  # takes a third of a second

    flow = _Flow(channels)
    graph = nx.MultiDiGraph(model=type(channels.program.module).__name__, join=channels.join)
    edges = [
        (maker, node, why, {"channels": size, **flow.group(group)})
        for node in flow.nodes
        for maker, group, size in flow.operands(node)
        if (why := flow.reason(node, group))
    ]
    ends = {end for maker, node, _, _ in edges for end in (maker, node)}
    for node in flow.nodes:
        if node in ends or flow.made[node]:
            graph.add_node(node.name, **flow.node(node))
    for maker, node, why, facts in edges:
        graph.add_edge(maker.name, node.name, reason=why, **facts)
    return graph


class _Flow:
    """Which nodes made the labels that arrive at a node."""

    def __init__(self, channels: Channels) -> None:
        self.channels, self.program = channels, channels.program
        size = len(channels.channel_of)
        self.group_of = np.full(size, -1, np.int64)
        for number, group in enumerate(channels.groups):
            self.group_of[group.channels] = number
        self.axes: dict[str, list[Axis]] = {}
        for axis in channels.axes:
            self.axes.setdefault(axis.node, []).append(axis)
        self.joins = {join.node.name for join in channels.joins}
        self.tied = {name for group in channels.groups for name in group.coupled_by}
        self.nodes: list[fx.Node] = list(self.program.graph.nodes)
        self.maker = np.full(size, -1, np.int64)  # of every label: the first node that has it
        self.made: dict[fx.Node, list[int]] = {}
        for index, node in enumerate(self.nodes):
            labels = self._labels(node)
            new = labels[self.maker[labels] < 0]
            self.maker[new] = index
            rows = [axis.channels for axis in self.axes.get(node.name, ()) if axis.role == "out"]
            groups = np.unique(self.group_of[np.concatenate([channels.channel_of[new], *rows])]).tolist()
            self.made[node] = [g for g in groups if g >= 0]

    def _labels(self, node: fx.Node) -> Ints:
        """The labels of a node's tensors, each once; not 0, which is none."""
        value = self.channels.values[node]
        tensors = [
            x for x in (value if isinstance(value, tuple | list) else (value,)) if isinstance(x, Tensor)
        ]
        found = np.unique(
            np.concatenate([np.zeros(1, np.int64), *(compact(x).flatten().numpy() for x in tensors)])
        )
        return cast(Ints, found[found != 0])

    def operands(self, node: fx.Node) -> Iterator[tuple[fx.Node, int, int]]:
        """Who made the channels that arrive at a node: (maker, group, number of channels)."""
        labels = np.unique(np.concatenate([np.zeros(0, np.int64), *map(self._labels, node.all_input_nodes)]))
        found = np.stack([self.maker[labels], self.group_of[self.channels.channel_of[labels]]])
        pairs, counts = np.unique(found, axis=1, return_counts=True)
        for (maker, group), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
            if group >= 0 and self.nodes[maker] is not node:
                yield self.nodes[maker], group, count

    def reason(self, node: fx.Node, group: int) -> str:
        """Why a node must follow a group's channels that arrive at it; "" if it need not."""
        found = [
            _REASONS[axis.role]
            for axis in self.axes.get(node.name, ())
            if axis.role in _REASONS and (self.group_of[axis.channels] == group).any()
        ]
        if node.name in self.joins:
            found.append("adds them, padded with zeros")
        elif node.name in self.channels.groups[group].coupled_by:
            found.append(f"ties them: {op_name(self.program, node)}")
        return "; ".join(dict.fromkeys(found))

    def group(self, index: int) -> dict[str, str | int]:
        """What an edge says of its group."""
        group = self.channels.groups[index]
        found: dict[str, str | int] = {"group": index + 1, "name": group.name}
        if group.pinned is not None:
            found |= {"pinned_at": group.pinned[0], "pinned": group.pinned[1]}
        return found

    def node(self, node: fx.Node) -> dict[str, str | int]:
        """What the graph says of a node."""
        axes = self.axes.get(node.name, [])
        roles = {axis.role for axis in axes}
        what = "layer" if roles - {"tensor"} else "tensor" if roles else "input"
        tied = node.name in self.joins | self.tied and not roles
        found: dict[str, Any] = {
            "what": "join" if tied else what,
            "operator": op_name(self.program, node),
            "groups": ",".join(str(group + 1) for group in self.made[node]),
        }
        if axes:
            found["layer"] = axes[0].layer
        pins = (self.channels.groups[group].pinned for group in self.made[node])
        reasons = dict.fromkeys(f"{pin[0]}: {pin[1]}" for pin in pins if pin is not None)
        return found | ({"pinned": "; ".join(reasons)} if reasons else {})
