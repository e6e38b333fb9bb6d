"""A removal: which channels go, what follows from it, and the programs that it makes.

legal, feasible    the largest part of what is wanted that can go
mask               zeros where removed channels are read: same graph, same shapes
apply              channels taken out of every tensor that they sit on
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphcomp.channels.labels import Ints, Marks
from graphcomp.channels.liveness import Idle, live_of
from graphcomp.channels.masks import mask
from graphcomp.channels.model import Balance, ChannelGroup, Channels, Mixing
from graphcomp.channels.shifts import Shift, shifts
from graphcomp.channels.surgery import Surgeon
from graphcomp.errors import SurgeryError
from graphcomp.ir import Program

Score = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Removal:
    """Channels that go from a program; as wanted, until `legal` or `feasible` say what can.

    Attributes:
        channels: the analysis of the program.
        gone: one bool a channel id. Not changed any more.
    """

    channels: Channels
    gone: Marks

    @classmethod
    def of(cls, channels: Channels, ids: Iterable[int] = ()) -> "Removal":
        """Of the channels with these ids; of none."""
        return cls(channels, channels.marks(ids))

    @classmethod
    def from_rows(cls, channels: Channels, rows: Mapping[str, Sequence[int]]) -> "Removal":
        """The removal back from its `rows`; SurgeryError if it does not fit this program."""
        gone = channels.marks()
        axes = {a.weight: a for a in channels.axes if a.role == "out"}
        for name, positions in rows.items():
            if name not in axes:
                raise SurgeryError(
                    f"{name}: found no such layer, expected one of {len(axes)} that produce channels"
                )
            width = len(axes[name].channels)
            outside = [row for row in positions if not 0 <= row < width]
            if outside:
                raise SurgeryError(f"{name}: found row {outside[0]}, expected 0 to {width - 1}")
            gone[axes[name].channels[list(positions)]] = True
        found, wanted = cls(channels, gone).rows, {k: sorted(set(v)) for k, v in rows.items() if v}
        if found != wanted:
            odd = next(k for k, v in found.items() if wanted.get(k) != v)
            raise SurgeryError(
                f"{odd}: found a plan that splits coupled channels, expected a plan made for this program"
            )
        legal = cls(channels, gone).legal(np.zeros(len(gone)))
        lost = int((gone & ~legal.gone).sum())
        if lost:
            raise SurgeryError(f"plan: found {lost} channels that cannot be removed, expected a legal choice")
        return legal

    def __len__(self) -> int:
        return int(self.gone.sum())

    def kept(self, group: ChannelGroup) -> int:
        """How many channels of a group stay."""
        return int((~self.gone[group.channels]).sum())

    @cached_property
    def rows(self) -> dict[str, list[int]]:
        """The removal as plain data: weight -> output rows that go."""
        axes = (a for a in self.channels.axes if a.role == "out" and self.gone[a.channels].any())
        return {a.weight: np.flatnonzero(self.gone[a.channels]).tolist() for a in axes}

    @cached_property
    def idle(self) -> Idle:
        """Nodes, channels and tensors that do nothing for the result any more."""
        return live_of(self.channels).after(self.gone)

    @cached_property
    def shifts(self) -> list[Shift]:
        """What readers lose with channels that hold constants (`channels.shifts`)."""
        return shifts(self.channels, self.gone)

    @cached_property
    def restated(self) -> list[str]:
        """Nodes that computed with all channels of an axis and compute with what stays: another function."""
        gone = ((m, self.gone[m.channels]) for m in self.channels.mixings if m.how != "product")
        return [m.node.name for m, lost in gone if lost.any() and not lost.all()]

    def legal(self, score: Score) -> "Removal":
        """The largest part that can be removed, keeping channels of high `score` first.

        Restores pinned channels, one channel of every tensor that would be left empty and is missed
        (`channels.liveness`), and channels of convolution groups that would become smaller than their
        siblings; then adds the sums of padded joins of which both operands are gone, and the channels of
        layers that work for nobody any more. Terminates since it only restores.
        """
        channels = self.channels
        gone = self.gone & channels.may_go
        idle = _restore(channels, gone, score)
        if channels.sums.any():
            gone |= channels.sums
            gone[list(channels.pinned)] = False
            idle = _settle_joins(channels, gone)
        return Removal(channels, gone | idle.channels)

    def feasible(self, score: Score) -> tuple["Removal", dict[str, str]]:
        """`legal`, then a trial; what turns out to be in the way is kept, with the reason by node."""
        kept: dict[str, str] = {}
        found = self.legal(score)
        while True:
            try:
                Surgeon(found.channels, found.gone, found.idle, "trial", on_meta=True).run()
                return found, kept
            except SurgeryError as refusal:
                if not refusal.channels:
                    raise
                kept[refusal.node] = str(refusal)
                stays = _with_operands(found.channels, refusal.channels)
                found = Removal(found.channels, found.gone & ~stays).legal(score)

    def mask(self) -> Program:
        """The program with zeros where removed channels are read: in the columns of readers, and before sums.

        What readers lose with channels that hold a constant goes into their biases, so that it is lossless to
        remove filters of zeros. Readers without a bias get one.
        """
        return mask(self.channels, self.gone, self.shifts)

    def apply(self, by: str) -> Program:
        """The program without the channels, its data movement rewritten; of a legal removal.

        Args:
            by: the pass, recorded on every node that changes.

        Raises:
            SurgeryError: naming a node that cannot be rewritten exactly.
        """
        return Surgeon(self.channels, self.gone, self.idle, by).run()


def _restore(channels: Channels, gone: Marks, score: Score) -> Idle:
    """Bring back in place what must stay; returns what then still works."""
    while True:
        idle, before = live_of(channels).after(gone), int(gone.sum())
        for span in idle.missed():
            if gone[span].all():
                gone[span[np.argmax(score[span])]] = False
        if channels.balanced or channels.mixings:
            names = live_of(channels).after(gone).names
            for balance in channels.balanced:
                if balance.node not in names:
                    _balance(balance, gone, score)
            for mixing in channels.mixings:
                if mixing.node.name not in names:
                    _keep_at_least(mixing, gone, score)
        if int(gone.sum()) == before:
            return idle


def _balance(balance: Balance, gone: Marks, score: Score) -> None:
    width = int((~gone[balance.rows]).sum(1).max())
    for row in balance.rows:
        if not (balance.spare and gone[row].all()):
            _restore_best(row, width, gone, score)


def _keep_at_least(mixing: Mixing, gone: Marks, score: Score) -> None:
    if mixing.least > 1:
        _restore_best(mixing.channels, min(mixing.least, len(mixing.channels)), gone, score)


def _restore_best(among: Ints, count: int, gone: Marks, score: Score) -> None:
    """Bring back the channels of highest score until so many stay."""
    for channel in among[np.argsort(-score[among], kind="stable")]:
        if int((~gone[among]).sum()) >= count:
            break
        gone[channel] = False


def _settle_joins(channels: Channels, gone: Marks) -> Idle:
    """A sum's channel goes only if both operands' channels are gone.

    Which sums go follows from the other channels alone, not from scores: `from_rows` must find the same ones.
    """
    while True:
        before = int(gone.sum())
        for join in channels.joins:
            a, b = join.operands
            gone[join.result[~(gone[a] & gone[b])]] = False
        idle = _restore(channels, gone, np.zeros(len(gone)))
        if int(gone.sum()) == before:
            return idle


def _with_operands(channels: Channels, ids: Iterable[int]) -> Marks:
    """These channels and, for sums among them, what they are sums of: a sum goes when both have gone."""
    wanted = channels.marks(ids)
    for join in reversed(channels.joins):
        for operand in join.operands:
            wanted[operand[wanted[join.result]]] = True
    return wanted
