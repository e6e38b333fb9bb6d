"""What still works after a removal: tensors may lose all of their channels where nobody misses them.

A concatenation can do without an operand. A layer whose channels only concatenations read may therefore lose
all of them: a layer of a DenseNet, a branch of an Inception block. With it goes whatever worked for it alone.

    empty     all channels of the node's value have gone
    idle      empty, or read by idle nodes only
    missed    empty, but read by a node that is neither idle nor can do without it
"""

from collections.abc import Iterator
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor, fx

from graphcomp.channels.labels import Ints, Marks, compact, varying
from graphcomp.channels.model import Channels
from graphcomp.channels.moves import concatenated_axis
from graphcomp.ir import Program, acts_in_place, is_read_later


def live_of(channels: Channels) -> "Liveness":
    """The same object whenever it is asked for the same analysis."""
    if channels not in _KNOWN:
        _KNOWN[channels] = Liveness(channels)
    return _KNOWN[channels]


class Liveness:
    """Which nodes work, as a function of the channels that have gone (one bool a channel id)."""

    def __init__(self, channels: Channels) -> None:
        graph = channels.program.graph
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.size = len(channels.channel_of)
        self.spans: list[Ints] = []
        self.spans_of = self._find_spans(channels)
        self._members = np.concatenate(self.spans)
        self._starts = np.cumsum([0, *map(len, self.spans[:-1])])
        self._is_whole = self._members[self._starts] != 0
        self.readers: list[list[tuple[int, bool]]] = [
            [(self.index[user], _can_spare(channels, user, node)) for user in node.users]
            for node in self.nodes
        ]
        self.stays = [not _may_idle(channels, node) for node in self.nodes]
        self.pieces = [self._source_of_piece(node) for node in self.nodes]
        self.tensors = channels.program.tensors
        self.tensors_of = [_used(channels.program, node) for node in self.nodes]
        self.groups = [g for g in channels.groups if g.pinned is None]

    def after(self, gone: Marks) -> "Idle":
        """What does nothing any more once these channels have gone."""
        return Idle(self, gone)

    def empty(self, gone: Marks) -> Marks:
        """The nodes whose values have lost all of their channels."""
        lost = np.logical_and.reduceat(gone[self._members], self._starts) & self._is_whole
        if not lost.any():
            return np.zeros(len(self.nodes), bool)
        return np.array([bool(spans) and all(lost[s] for s in spans) for spans in self.spans_of])

    def _find_spans(self, channels: Channels) -> list[list[int]]:
        """Per node the sets of channels, by number, of the tensors that it yields."""
        known: dict[bytes, int] = {}
        of_labels: dict[int, int] = {}
        found = []
        for node in self.nodes:
            value = channels.values[node]
            spans = []
            for labels in value if isinstance(value, tuple | list) else (value,):
                if not isinstance(labels, Tensor) or not labels.numel():
                    continue
                if id(labels) not in of_labels:
                    span = np.unique(channels.channel_of[compact(labels).flatten().numpy()])
                    number = known.setdefault(span.tobytes(), len(self.spans))
                    if number == len(self.spans):
                        self.spans.append(span)
                    of_labels[id(labels)] = number
                spans.append(of_labels[id(labels)])
            found.append(spans)
        return found

    def _source_of_piece(self, node: fx.Node) -> int | None:
        """The node of whose several tensors this one is."""
        sources = [self.index[source] for source in node.all_input_nodes[:1]]
        return next((source for source in sources if len(self.spans_of[source]) > 1), None)


class Idle:
    """What does nothing for the result any more; found out once, as `gone` was when this was made."""

    def __init__(self, live: Liveness, gone: Marks) -> None:
        self._live, self._empty = live, live.empty(gone)

    @cached_property
    def nodes(self) -> Marks:
        """The nodes, in the order of the graph."""
        live, idle = self._live, np.zeros(len(self._live.nodes), bool)
        if not self._empty.any():
            return idle
        for i in reversed(range(len(idle))):
            readers = live.readers[i]
            unread = bool(readers) and not live.stays[i] and all(idle[user] for user, _ in readers)
            idle[i] = self._empty[i] or unread
        return idle

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the nodes."""
        return frozenset(self._live.nodes[i].name for i in np.flatnonzero(self.nodes).tolist())

    @cached_property
    def channels(self) -> Marks:
        """The channels of whole groups that sit in idle nodes only; they can go with them."""
        live, found = self._live, np.zeros(self._live.size, bool)
        if self.nodes.any():
            working = np.zeros(live.size, bool)
            for span in {s for i in np.flatnonzero(~self.nodes).tolist() for s in live.spans_of[i]}:
                working[live.spans[span]] = True
            for group in live.groups:
                if not working[group.channels].any():
                    found[group.channels] = True
        return found

    @cached_property
    def tensors(self) -> frozenset[str]:
        """Names of parameters and buffers that only idle nodes use."""
        if not self.nodes.any():
            return frozenset()
        live = self._live
        working = {id(t) for i in np.flatnonzero(~self.nodes).tolist() for t in live.tensors_of[i]}
        return frozenset(name for name, tensor in live.tensors.items() if id(tensor) not in working)

    def missed(self) -> Iterator[Ints]:
        """Sets of channels of which one must come back, for all of them are gone and somebody needs some."""
        live, idle = self._live, self.nodes
        for i in np.flatnonzero(self._empty).tolist():
            source = live.pieces[i]
            cut_off = source is not None and not idle[source]
            if cut_off or not all(idle[user] or can_spare for user, can_spare in live.readers[i]):
                yield live.spans[live.spans_of[i][0]]


def _used(program: Program, node: fx.Node) -> list[Tensor]:
    """The parameters and buffers that a node uses."""
    name = str(node.target)
    if node.op == "get_attr":
        return [program.tensors[name]] if name in program.tensors else []
    if node.op != "call_module":
        return []
    module = program.layer(name)
    return [*module.parameters(), *module.buffers()]


def _may_idle(channels: Channels, node: fx.Node) -> bool:
    """Whether a node that nobody reads can go."""
    if node.op in ("placeholder", "output"):
        return False
    program = channels.program
    return not acts_in_place(program.module, node) or (
        bool(node.all_input_nodes) and not is_read_later(program, node)
    )


def _can_spare(channels: Channels, user: fx.Node, operand: fx.Node) -> bool:
    """Whether a node can be rewritten to do without this operand, once that has no channels."""
    labels, axis = channels.values[operand], concatenated_axis(channels.program, user)
    if not isinstance(labels, Tensor) or axis is None or not axis % labels.ndim:
        return False  # samples are concatenated
    return set(varying(labels)) <= {axis % labels.ndim}


_KNOWN: WeakKeyDictionary[Channels, Liveness] = WeakKeyDictionary()
