"""What narrowing a group of channels costs, once those that read it have made up for what it lost.

Every layer that reads a group is left with an error (`elimination`), and a group's loss is the sum over its
readers: so its channels have an order, and it has a curve of losses by width. What one squared error at a
layer does to the outputs depends on what is behind it; it is measured, once a group, on samples that no
statistics were taken of (METHODS 9.4, `sensitivity`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcomp.base import distributed, part
from graphcomp.bases.elimination import Curve, Part, best_without, eliminate, inverse
from graphcomp.bases.reading import POSITIONS, SAMPLES, bytes_to_follow, reading
from graphcomp.bases.sensitivity import Change, movements
from graphcomp.bases.sums import own_shares
from graphcomp.budget import Judgement, Scores
from graphcomp.channels import ChannelGroup, Channels, Ints, Join
from graphcomp.ir import DctLayer
from graphcomp.measure import (
    as_weight,
    is_mixing,
    matrix,
    matrix_shape,
)
from graphcomp.pipeline import Context

NO_ROOM = (
    "its readers' second moments take more than half of the memory that a pass may hold: give more --memory"
)
UNEVEN = "a layer reads its channels unevenly often"
COEFFICIENTS = "a layer that reads it is stored as coefficients"
MULTIPLIED = "its channels are multiplied with others, and no layer that reads them could make up for that"
UNREAD = "no layer that mixes channels reads it"


@dataclass(frozen=True, eq=False)
class _Reader:
    """One group of a layer that mixes channels.

    Attributes:
        layer, block: path, and which of its convolution groups.
        channels: ids `[K / taps]` of what its columns read.
        taps: columns a channel.
    """

    layer: str
    block: int
    channels: Ints
    taps: int


@dataclass(frozen=True, eq=False)
class _Columns:
    """What a reader reads of a group.

    Attributes:
        reader: who.
        present: which channels of the group.
        columns: theirs, `[channels, m]`; None if they are unevenly many.
        own: what of each column is the group's own, `[channels, m]`: 1 but for padded sums (`sums`).
    """

    reader: _Reader
    present: Ints
    columns: Tensor | None
    own: Tensor

    @property
    def flat(self) -> Tensor:
        """All columns, one after the other."""
        return cast(Tensor, self.columns).flatten()


def calibrated(
    judgement: Judgement, channels: Channels, widths: Mapping[ChannelGroup, int], context: Context, name: str
) -> Judgement:
    """A criterion's judgement with the losses of every group by width, in one unit; collective.

    Args:
        judgement: its scores say which channels go first.
        channels: the analysis that the groups are of.
        widths: of the groups to look at: to which each is narrowed for the one measurement.
        context, name: of the pass.
    """
    statistics = Compensation(channels, context, name)
    unjudged = {g: reason for g in widths if (reason := statistics.why_unjudged(g)) is not None}
    curves = {g: _curve(statistics, judgement, g) for g in widths if g not in unjudged}
    narrowed = {g: (c, widths[g]) for g, c in curves.items() if widths[g] < len(g.channels)}
    moved = statistics.sensitivities(narrowed)
    losses = {g: curve.lost * moved.get(g, 1.0) for g, curve in curves.items()}
    evidence = {g: {**judgement.evidence.get(g, {}), "sensitivity": moved[g]} for g in narrowed}
    return replace(
        judgement,
        losses=losses,
        unjudged={**judgement.unjudged, **unjudged},
        evidence={**judgement.evidence, **evidence},
    )


def _curve(statistics: "Compensation", judgement: Judgement, group: ChannelGroup) -> Curve:
    """A group's curve along the criterion's order; one that is known is taken."""
    if group not in judgement.losses:
        return statistics.curve(group, judgement.scores)
    order = np.argsort(judgement.scores[group.channels], kind="stable")
    return Curve(order, judgement.losses[group])


class Compensation:
    """Statistics of all readers, and the curves of groups."""

    def __init__(
        self,
        channels: Channels,
        context: Context,
        name: str,
        samples: int = SAMPLES,
        positions: int = POSITIONS,
    ) -> None:
        self.channels, self.program, self.context = channels, channels.program, context
        self.readers = _readers(channels)
        layers = list(dict.fromkeys(r.layer for r in self.readers))
        found = reading(self.program, context, name, layers, samples, positions)
        self.held_out, self.grams, self.weights = found.held_out, found.grams, found.weights
        self.unread, self.room = found.unread, context.memory // 2  # the other half may be full of Grams
        self.own = own_shares(channels, found.some)
        self._inverses: dict[_Reader, Tensor] = {}
        self._reads: dict[ChannelGroup, list[_Columns]] = {}

    def why_unjudged(self, group: ChannelGroup) -> str | None:
        """Why there is no curve for a group; None if there is one."""
        found = self._of(group)
        if not found:
            return UNREAD
        if any(
            m.how == "product" and np.isin(m.channels, group.channels).any() for m in self.channels.mixings
        ):
            return MULTIPLIED
        if any(isinstance(self.program.layer(c.reader.layer), DctLayer) for c in found):
            return COEFFICIENTS
        unread = [self.unread[c.reader.layer] for c in found if c.reader.layer in self.unread]
        if unread:
            return f"a layer that reads it {unread[0]}"
        if any(c.columns is None for c in found):
            return UNEVEN
        return NO_ROOM if self._needed(found) > self.room else None

    def _needed(self, found: Sequence[_Columns]) -> int:
        """Bytes that a group takes."""
        shapes = [matrix_shape(self.program.layer(c.reader.layer)) for c in found]
        sizes = [(c.flat.numel(), o) for c, (_, o, _) in zip(found, shapes, strict=True)]
        return bytes_to_follow(sizes, max(k for _, _, k in shapes))

    def _of(self, group: ChannelGroup) -> list[_Columns]:
        if group not in self._reads:
            self._reads[group] = self._find(group)
        return self._reads[group]

    def _find(self, group: ChannelGroup) -> list[_Columns]:
        ids, shares = _summed(self.channels, group, self.own)
        found = []
        for reader in self.readers:
            at = ids[reader.channels]
            present = np.unique(at[at >= 0])
            if not len(present):
                continue
            places = [np.flatnonzero(at == p) for p in present]
            columns, own = None, torch.ones(0, dtype=torch.float64)
            if len({len(p) for p in places}) == 1:
                taps = torch.arange(reader.taps)
                starts = torch.from_numpy(np.stack(places)) * reader.taps
                columns = (starts.unsqueeze(2) + taps).flatten(1)
                parts = shares[reader.channels][np.stack(places)]
                own = torch.from_numpy(parts).repeat_interleave(reader.taps, 1)
            found.append(_Columns(reader, present, columns, own))
        return found

    def _inverse(self, reader: _Reader, needed: int) -> Tensor:
        """H; kept if there is room beside what is needed, since many groups may be read by one layer."""
        kept = self._inverses
        if reader in kept:
            return kept[reader]
        h = inverse(self.grams[reader.layer].matrix[reader.block])
        self._make_room(h.nbytes + needed)
        if h.nbytes + needed <= self.room:
            kept[reader] = h
        return h

    def _make_room(self, needed: int) -> None:
        """Forget the oldest inverses until the others leave so many bytes."""
        kept = self._inverses
        while kept and sum(h.nbytes for h in kept.values()) + needed > self.room:
            del kept[next(iter(kept))]

    def curve(self, group: ChannelGroup, scores: Scores | None = None) -> Curve:
        """Order and losses of a group that can be judged.

        Args:
            group: see `why_unjudged`.
            scores: importance by channel id, to go by instead of by what stays of the error.
        """
        given = None if scores is None else scores[group.channels]
        return eliminate(self._parts_of(group), group.blocks, given)

    def _parts_of(self, group: ChannelGroup, *, whole: bool = False) -> list[Part]:
        """What the readers have of a group.

        Args:
            group: see `why_unjudged`.
            whole: of padded sums all, not only what is the group's own.
        """
        parts, needed = [], self._needed(self._of(group))
        self._make_room(needed)
        for found in self._of(group):
            reader = found.reader
            w = matrix(self.program.layer(reader.layer))[reader.block]
            f = self.weights[reader.layer].reshape(-1, len(w))[reader.block]
            h = self._inverse(reader, needed)[found.flat.unsqueeze(1), found.flat]
            own = torch.ones_like(found.own) if whole else found.own
            parts.append(Part(found.present, h, (f.unsqueeze(1) * own.flatten()).sqrt() * w[:, found.flat]))
        return parts

    def sensitivities(self, curves: dict[ChannelGroup, tuple[Curve, int]]) -> dict[ChannelGroup, float]:
        """How much the outputs move, per unit of the curve's loss, once readers have made up for it.

        Args:
            curves: every group's curve, and the width to which it is narrowed for the measurement.
        """
        self._inverses.clear()
        changes, tell = _Changes(self, curves), part(self.context.progress, 0.8, 0.2)
        moved = distributed.on_first(
            lambda: list(movements(self.program, self.held_out, changes, self.room // 2, tell).values())
        )
        expected = [self._expected(group, *narrower) for group, narrower in curves.items()]
        return {g: m / e if e > 0 else 0.0 for g, m, e in zip(curves, moved, expected, strict=True)}

    def _expected(self, group: ChannelGroup, curve: Curve, width: int) -> float:
        """The loss of what `change` does: readers lose padded sums whole, not only the group's own part."""
        if all(bool((found.own == 1).all()) for found in self._of(group)):
            return float(curve.lost[width])
        gone = curve.order[: len(group.channels) - width]
        return sum(reader.without(gone) for reader in self._parts_of(group, whole=True))

    def change(self, group: ChannelGroup, curve: Curve, width: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Reader -> its weight without what a narrower group lost, the rest fitted again, and the offset."""
        gone = curve.order[: len(group.channels) - width]
        weights: dict[str, Tensor] = {}
        offsets: dict[str, Tensor] = {}
        for found in self._of(group):
            reader = found.reader
            if reader.layer not in weights:  # a copy: of float64 it would be a view of the network's own
                weights[reader.layer] = matrix(self.program.layer(reader.layer)).clone()
            w = weights[reader.layer]
            offset = offsets.setdefault(reader.layer, w.new_zeros(w.shape[:2]))
            is_gone = torch.from_numpy(np.isin(found.present, gone))
            s = cast(Tensor, found.columns)[is_gone].flatten()
            gram = self.grams[reader.layer]
            old, g = w[reader.block].clone(), gram.matrix[reader.block]
            w[reader.block] = best_without(old, g, s)
            offset[reader.block] = (old - w[reader.block]) @ gram.mean[reader.block]
        return {
            layer: (as_weight(self.program.layer(layer), w), offsets[layer].flatten())
            for layer, w in weights.items()
        }


class _Changes(Mapping[ChannelGroup, Change]):
    """What narrowing does to the readers of a group, worked out when it is asked for."""

    def __init__(self, statistics: Compensation, curves: Mapping[ChannelGroup, tuple[Curve, int]]) -> None:
        self.statistics, self.curves = statistics, curves

    def __getitem__(self, group: ChannelGroup) -> Change:
        return self.statistics.change(group, *self.curves[group])

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.curves)

    def __len__(self) -> int:
        return len(self.curves)


def _readers(channels: Channels) -> list[_Reader]:
    """Every group of every layer that reads channels and is not one that passes them on one by one."""
    found = []
    for axis in channels.axes:
        layer = axis.layer
        if not axis.reads or layer not in channels.program.called_modules():
            continue
        module = channels.program.layer(layer)
        if not is_mixing(module):
            continue
        g, _, k = matrix_shape(module)
        if g > 1 and len(axis.channels) == g:
            continue  # depthwise: its outputs are the same channels
        for block, ids in enumerate(np.split(axis.channels, g)):
            found.append(_Reader(layer, block, ids, k // len(ids)))
    return found


def _summed(
    channels: Channels,
    group: ChannelGroup,
    own: Mapping[Join, tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> tuple[Ints, NDArray[np.float64]]:
    """Channel id -> position in the group, -1 for others, and what of it is the group's own.

    Sums of padded operands count as their operands, by as much as is theirs.
    """
    position = np.full(len(channels.channel_of), -1, np.int64)
    position[group.channels] = np.arange(len(group.channels))
    shares = np.ones(len(position))
    for join in channels.joins:  # operands come before their sums
        there = [position[operand] >= 0 for operand in join.operands]
        for operand, is_own, share in zip(join.operands, there, own[join], strict=True):
            position[join.result] = np.where(is_own, position[operand], position[join.result])
            shares[join.result] = np.where(is_own, shares[operand] * share, shares[join.result])
        both = there[0] & there[1]
        shares[join.result] = np.where(both, 1.0, shares[join.result])
    return position, shares
