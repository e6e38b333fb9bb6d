"""Which sets of channels can go."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphcomp.channels.labels import Ints
from graphcomp.channels.liveness import live_of
from graphcomp.channels.model import Channels
from graphcomp.errors import SurgeryError

Drop = np.ndarray[Any, np.dtype[np.bool_]]
"""Which channels go: one bool a channel id."""


def no_drop(channels: Channels) -> Drop:
    """The empty choice."""
    return np.zeros(len(channels.channel_of), bool)


def legalise(channels: Channels, drop: Drop, score: np.ndarray[Any, Any]) -> Drop:
    """The largest part of `drop` that can be removed, keeping channels of high `score` first.

    Restores pinned channels, one channel of every tensor that would be left empty and is missed
    (`channels.liveness`), and channels of convolution groups that would become smaller than their siblings;
    then adds the sums of padded joins of which both operands are gone, and the channels of layers that work
    for nobody any more. Terminates since it only restores.
    """
    removable = no_drop(channels)
    for group in channels.removable:
        removable[group.channels] = True
    drop, derived = drop & removable, _derived(channels)
    _restore(channels, drop, score)
    if derived:
        drop[derived] = True
        drop[list(channels.pinned)] = False
        _settle_joins(channels, drop)
    return drop | live_of(channels).only_idle(drop)


def _derived(channels: Channels) -> list[int]:
    return [c for g in channels.groups if g.derived for c in g.channels.tolist()]


def _restore(channels: Channels, drop: Drop, score: np.ndarray[Any, Any]) -> None:
    while True:
        before = int(drop.sum())
        for span in live_of(channels).missed(drop):
            if drop[span].all():
                drop[span[np.argmax(score[span])]] = False
        idle = live_of(channels).idle_names(drop)
        for node, rows in channels.balanced:
            if node not in idle:
                _balance(rows, drop, score)
        if int(drop.sum()) == before:
            return


def _balance(rows: Ints, drop: Drop, score: np.ndarray[Any, Any]) -> None:
    width = int((~drop[rows]).sum(1).max())
    for row in rows:
        for channel in row[np.argsort(-score[row], kind="stable")]:
            if int((~drop[row]).sum()) >= width:
                break
            drop[channel] = False


def _settle_joins(channels: Channels, drop: Drop) -> None:
    """A sum's channel goes only if both operands' channels are gone.

    Which sums go follows from the other channels alone, not from scores: `drop_of` must find the same ones.
    """
    while True:
        before = int(drop.sum())
        for join in channels.joins:
            a, b = join.operands
            drop[join.result[~(drop[a] & drop[b])]] = False
        _restore(channels, drop, np.zeros(len(drop)))
        if int(drop.sum()) == before:
            return


def dropped_rows(channels: Channels, drop: Drop) -> dict[str, list[int]]:
    """The choice as plain data: layer -> output rows that go."""
    rows: dict[str, list[int]] = {}
    for axis in channels.axes:
        gone = np.flatnonzero(drop[axis.channels]).tolist() if axis.role == "out" else []
        if gone:
            rows[axis.weight] = gone
    return rows


def drop_of(channels: Channels, rows: Mapping[str, Sequence[int]]) -> Drop:
    """The choice back from `dropped_rows`; SurgeryError if it does not fit this program."""
    drop = no_drop(channels)
    axes = {a.weight: a for a in channels.axes if a.role == "out"}
    for name, gone in rows.items():
        if name not in axes:
            raise SurgeryError(
                f"{name}: found no such layer, expected one of {len(axes)} that produce channels"
            )
        width = len(axes[name].channels)
        outside = [row for row in gone if not 0 <= row < width]
        if outside:
            raise SurgeryError(f"{name}: found row {outside[0]}, expected 0 to {width - 1}")
        drop[axes[name].channels[list(gone)]] = True
    wanted = {k: sorted(set(v)) for k, v in rows.items() if v}
    if dropped_rows(channels, drop) != wanted:
        odd = next(k for k, v in dropped_rows(channels, drop).items() if wanted.get(k) != v)
        raise SurgeryError(
            f"{odd}: found a plan that splits coupled channels, expected a plan made for this program"
        )
    legal = legalise(channels, drop, np.zeros(len(drop)))
    lost = int((drop & ~legal).sum())
    if lost:
        raise SurgeryError(f"plan: found {lost} channels that cannot be removed, expected a legal choice")
    return legal
