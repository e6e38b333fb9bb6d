"""What the rules write down while the graph runs on labels; `channels.analysis` makes channels of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx

from graphcomp.channels.labels import compact, varying
from graphcomp.channels.model import ELEMENTS, Granularity, How, JoinPolicy, Role
from graphcomp.errors import AnalysisError
from graphcomp.ir import Program

Count = tuple[Tensor, int | None]
"""Labels, and the axis along which a number counts their positions; None: in another way."""


class Unread:
    """A parameter or buffer, or what is computed from some, that no operator has used as labels yet."""


MANY = 1 << 16
"""Pairs of labels among which most are found again and again: of tokens, everywhere the same channels."""


def _once(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs, of many each once: those that repeat their neighbour are found without sorting."""
    if a.numel() <= MANY:
        return a.flatten(), b.flatten()
    steady = [(d, y) for x, y in ((a, b), (b, a)) for d in range(x.ndim) if not x.stride(d)]
    if steady:
        d, other = max(steady, key=lambda found: found[1].size(found[0]))
        fresh = torch.ones(a.shape, dtype=torch.bool)
        ends = other.narrow(d, 1, other.size(d) - 1), other.narrow(d, 0, other.size(d) - 1)
        torch.ne(*ends, out=fresh.narrow(d, 1, other.size(d) - 1))
        a, b = a[fresh], b[fresh]
    beyond = int(b.max()) + 1
    pairs = torch.from_numpy(np.unique((a * beyond + b).flatten().numpy()))
    return pairs // beyond, pairs % beyond


@dataclass
class Site:
    """Where labels sit: an axis in the making."""

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
    granularity: Granularity = "channel"
    constant: frozenset[fx.Node] = frozenset()
    unfollowed: frozenset[fx.Node] = frozenset()
    values: dict[fx.Node, Any] = field(default_factory=dict)
    counts: dict[fx.Node, list[Count]] = field(default_factory=dict)
    second: dict[fx.Node, tuple[int, Tensor]] = field(default_factory=dict)
    entries: dict[fx.Node, tuple[list[Count], ...]] = field(default_factory=dict)
    count: int = 1
    edges: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    pins: list[tuple[str, str, Tensor, int | None]] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    site_of: dict[tuple[int, int], int] = field(default_factory=dict)
    rectangular: list[tuple[str, Tensor]] = field(default_factory=list)
    rows: list[tuple[str, Tensor, bool]] = field(default_factory=list)
    joins: list[tuple[fx.Node, int, Tensor, Tensor, Tensor]] = field(default_factory=list)
    mixings: list[tuple[fx.Node, fx.Node, int, Tensor, How, tuple[Any, ...]]] = field(default_factory=list)
    frozen: set[int] = field(default_factory=set)

    @cached_property
    def input_label(self) -> Tensor:
        """The one label of all that comes from outside: inputs in one batch have no channels of their own."""
        return self.mint(1)

    def mint(self, n: int) -> Tensor:
        """n new labels."""
        self.count += n
        return torch.arange(self.count - n, self.count)

    def pin(self, node: fx.Node, labels: Tensor, reason: str) -> None:
        """These labels must stay."""
        self.pins.append((node.name, reason, compact(labels).flatten(), None))

    def pin_count(self, node: fx.Node, count: Count, reason: str) -> None:
        """A number must stay: all that it counts, if channels turn out to differ along its axis."""
        labels, axis = count
        if axis is None:
            self.pin(node, labels, reason)
        else:
            self.pins.append((node.name, reason, compact(labels).transpose(0, axis), axis))

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
            self.edges.append((node.name, *_once(a, b)))

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
            self.needs_rectangle(node, value)  # also what of it is not read
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
            self.sites.append(Site(node.name, role, {}, labels, groups))
        for i in old:
            self.couple(node, self.sites[i].labels, labels)
            if {role, self.sites[i].role} == {"in", "out"}:  # neither rows nor columns, but both
                self.pin(node, labels, "one weight makes these channels and reads them")
        for key, tensor in keys.items():
            if key not in self.site_of:
                self.sites[index].tensors[tensor] = None
                self.site_of[key] = index

    def is_held(self, labels: Tensor) -> bool:
        """Whether these are elements of a tensor (a mask, a table of positions), and no layer's rows."""
        return any(site.role == "tensor" and bool((site.labels == labels[0]).any()) for site in self.sites)

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
