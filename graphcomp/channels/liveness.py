"""What still works after a removal: tensors may lose all of their channels where nobody misses them.

A concatenation can do without an operand. A layer whose channels only concatenations read may therefore lose
all of them: a layer of a DenseNet, a branch of an Inception block. With it goes whatever worked for it alone.

    empty     all channels of the node's value have gone
    idle      empty, or read by idle nodes only
    missed    empty, but read by a node that is neither idle nor can do without it
"""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from graphcomp.channels.labels import Ints, compact, varying
from graphcomp.channels.model import Channels
from graphcomp.channels.moves import concatenated_axis
from graphcomp.ir import Program, acts_in_place, is_read_later

Marks = NDArray[np.bool_]
"""One bool a node, in the order of the graph; or one a channel id."""


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
        self._spans: list[Ints] = []
        self._spans_of = self._find_spans(channels)
        self._members = np.concatenate(self._spans)
        self._starts = np.cumsum([0, *map(len, self._spans[:-1])])
        self._is_whole = self._members[self._starts] != 0
        self._readers: list[list[tuple[int, bool]]] = [
            [(self.index[user], _can_spare(channels, user, node)) for user in node.users]
            for node in self.nodes
        ]
        self._stays = [not _may_idle(channels, node) for node in self.nodes]
        self._pieces = [self._source_of_piece(node) for node in self.nodes]
        self._tensors = channels.program.tensors
        self._tensors_of = [_used(channels.program, node) for node in self.nodes]
        self._groups = [g for g in channels.groups if g.pinned is None]

    def idle(self, gone: Marks) -> Marks:
        """The nodes that do nothing for the result any more, in the order of the graph."""
        return self._idle(self._empty(gone))

    def _idle(self, empty: Marks) -> Marks:
        idle = np.zeros(len(self.nodes), bool)
        if not empty.any():
            return idle
        for i in reversed(range(len(self.nodes))):
            readers = self._readers[i]
            unread = bool(readers) and not self._stays[i] and all(idle[user] for user, _ in readers)
            idle[i] = empty[i] or unread
        return idle

    def idle_names(self, gone: Marks) -> frozenset[str]:
        """The names of `idle` nodes."""
        return frozenset(self.nodes[i].name for i in np.flatnonzero(self.idle(gone)).tolist())

    def missed(self, gone: Marks) -> Iterator[Ints]:
        """Sets of channels of which one must come back, for all of them are gone and somebody needs some."""
        empty = self._empty(gone)
        if not empty.any():
            return
        idle = self._idle(empty)
        for i in np.flatnonzero(empty).tolist():
            source = self._pieces[i]
            cut_off = source is not None and not idle[source]
            if cut_off or not all(idle[user] or can_spare for user, can_spare in self._readers[i]):
                yield self._spans[self._spans_of[i][0]]

    def only_idle(self, gone: Marks) -> Marks:
        """The channels of whole groups that sit in idle nodes only; they can go with them."""
        found = np.zeros(self.size, bool)
        idle = self.idle(gone)
        if idle.any():
            working = np.zeros(self.size, bool)
            for span in {s for i in np.flatnonzero(~idle).tolist() for s in self._spans_of[i]}:
                working[self._spans[span]] = True
            for group in self._groups:
                if not working[group.channels].any():
                    found[group.channels] = True
        return found

    def unused(self, gone: Marks) -> frozenset[str]:
        """Names of parameters and buffers that only idle nodes use."""
        idle = self.idle(gone)
        if not idle.any():
            return frozenset()
        working = {id(t) for i in np.flatnonzero(~idle).tolist() for t in self._tensors_of[i]}
        return frozenset(name for name, tensor in self._tensors.items() if id(tensor) not in working)

    def _empty(self, gone: Marks) -> Marks:
        lost = np.logical_and.reduceat(gone[self._members], self._starts) & self._is_whole
        if not lost.any():
            return np.zeros(len(self.nodes), bool)
        return np.array([bool(spans) and all(lost[s] for s in spans) for spans in self._spans_of])

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
                    number = known.setdefault(span.tobytes(), len(self._spans))
                    if number == len(self._spans):
                        self._spans.append(span)
                    of_labels[id(labels)] = number
                spans.append(of_labels[id(labels)])
            found.append(spans)
        return found

    def _source_of_piece(self, node: fx.Node) -> int | None:
        """The node of whose several tensors this one is."""
        sources = [self.index[source] for source in node.all_input_nodes[:1]]
        return next((source for source in sources if len(self._spans_of[source]) > 1), None)


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
