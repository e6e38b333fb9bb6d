"""What the analysis finds: axes that channels sit on, groups of coupled channels, joins, and all of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import fx

from graphcomp.channels.labels import Ints, Marks
from graphcomp.ir import Program

if TYPE_CHECKING:
    import networkx as nx

ELEMENTS = -1
"""Stands for "all dimensions" where an axis is a whole parameter or buffer (role "tensor")."""

Role = Literal["out", "in", "norm", "tensor"]
JoinPolicy = Literal["couple", "pad"]
Granularity = Literal["channel", "head", "group"]


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
    def weight(self) -> str:
        """The dotted name of what is sliced first: the weight, where a layer has one."""
        return self.tensors[0][0]

    @property
    def layer(self) -> str:
        """The dotted path of the layer that owns the axis; of a tensor that no layer owns its name."""
        return self.weight.rpartition(".")[0] or self.weight

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


How = Literal["product", "zeros", "mean", "lowest", "highest", "spread", "norm"]


@dataclass(frozen=True, eq=False)
class Mixing:
    """An operator that computes with all channels of an axis, and what in front of it stands for removals.

    Attributes:
        node: the operator. source: its operand that channels go from. axis: of the operand.
        channels: at every position of that axis.
        how: product: zeros in one operand, which another is multiplied with. zeros: of a sum. mean: zeros,
            and what stays scaled by the number of channels. lowest, highest: what is no maximum (minimum).
            spread, norm: see `ir.masked`.
        args: for the function of `spread` and `norm`.
    """

    node: fx.Node
    source: fx.Node
    axis: int
    channels: Ints
    how: How = "product"
    args: tuple[Any, ...] = ()

    @property
    def least(self) -> int:
        """How many channels there must be: of one alone a variance says nothing."""
        return 2 if self.how in ("spread", "norm") and len(self.args[0]) == 1 else 1


@dataclass(frozen=True, eq=False)
class Balance:
    """Rows of channels that must keep the same number of them.

    Attributes:
        node: where.
        rows: rows x positions of channels.
        spare: whether a row may go whole.
    """

    node: str
    rows: Ints
    spare: bool = False


@dataclass(frozen=True, eq=False)
class Channels:
    """The result of `analyse`.

    Attributes:
        program: what was analysed.
        join: the policy that additions were analysed under.
        granularity: whether heads of attention, or groups of GroupNorm, go whole, or all lose equally many.
        axes, groups, joins: see their types.
        pinned: channel -> (node, reason), for every channel that must stay.
        channel_of: label -> channel; label 0 is no channel.
        values: node -> label tensor (or what the node yields if it is no tensor).
        second: node that yields channels by channels -> (axis, channels along it), beside those in `values`.
        balanced: see `Balance`.
        mixings: what computes with all channels of an axis (`channels.products`, `channels.mixing`).
    """

    program: Program
    join: JoinPolicy
    granularity: Granularity
    axes: tuple[Axis, ...]
    groups: tuple[ChannelGroup, ...]
    joins: tuple[Join, ...]
    pinned: dict[int, tuple[str, str]]
    channel_of: Ints
    values: dict[fx.Node, Any]
    second: dict[fx.Node, tuple[int, Ints]]
    balanced: tuple[Balance, ...]
    mixings: tuple[Mixing, ...] = ()

    @property
    def removable(self) -> tuple[ChannelGroup, ...]:
        """Groups that a criterion may choose from."""
        return tuple(g for g in self.groups if g.pinned is None and not g.derived)

    @cached_property
    def may_go(self) -> Marks:
        """The channels of these groups."""
        return self.marks(c for g in self.removable for c in g.channels.tolist())

    @cached_property
    def sums(self) -> Marks:
        """The channels of joins, whose operands decide."""
        return self.marks(c for g in self.groups if g.derived for c in g.channels.tolist())

    def marks(self, ids: Iterable[int] = ()) -> Marks:
        """One bool a channel id, true for these."""
        found = np.zeros(len(self.channel_of), bool)
        found[list(ids)] = True
        return found

    def group_of(self, layer: str) -> list[ChannelGroup]:
        """The groups that a layer produces channels of."""
        return [g for g in self.groups if layer in g.producers]

    def to_networkx(self) -> "nx.MultiDiGraph":
        """Who makes channels and who must follow, for networkx; attributes as `channels.graph` lists them."""
        from graphcomp.channels.graph import to_networkx

        return to_networkx(self)
