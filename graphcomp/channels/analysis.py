"""Channel provenance: which channels are coupled, found by running the graph on labels.

    producers mint labels ── data movement moves them ── readers say which label arrives at which position

Every operator does one of five things with labels, and `channels.rules` has one row an operator that says
which: it *mints* (a convolution's output), *passes* (activation, pooling), *moves* (cat, view, slice: the
operator itself runs on the labels), *couples* (an element-wise operator on several tensors: labels that meet
live or die together) or *pins* (inputs, outputs and whatever has no row: opaque is never wrong, and never
silent). Connected components of the couplings are the channels; channels on the same axes form a group.

What makes removal exact: the value at a position depends only on values of the same channel, or comes
through a reader, and readers read zero for what is removed. So dropping a channel everywhere is the same
function as writing zeros into the weights that read it (`channels.surgery`).
"""

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from graphcomp.channels.labels import Ints, components
from graphcomp.channels.model import (
    ELEMENTS,
    Axis,
    Balance,
    ChannelGroup,
    Channels,
    Granularity,
    Join,
    JoinPolicy,
    Mixing,
)
from graphcomp.channels.rules import apply_rule, constants_in, unfollowed
from graphcomp.channels.tracker import Tracker
from graphcomp.ir import Program


def analyse(program: Program, join: JoinPolicy = "couple", granularity: Granularity = "channel") -> Channels:
    """Find the coupled channels of a program.

    Args:
        program: any Program.
        join: "couple" ties the operands of every addition; "pad" lets each operand of an addition keep
            channels of its own, to be padded with zeros before the addition.
        granularity: "channel" narrows the heads of attention, all of a layer alike; "head": they go whole,
            each a channel of many rows, where a product has heads; "group": the same of GroupNorm's groups.

    Returns:
        The same object whenever it is asked for the same program and policies.

    Cost: one run of the graph on labels, plus connected components of the couplings; milliseconds. What is
    computed from parameters alone gets labels only where an operator with a rule takes it: a label for every
    element of every weight would cost seconds.
    """
    known = program.findings.setdefault("channels", {})
    asked = join, granularity
    if asked not in known:
        known[asked] = _analyse(program, *asked)
    return cast(Channels, known[asked])


def _analyse(program: Program, join: JoinPolicy, granularity: Granularity) -> Channels:
    constant = constants_in(program)
    tracker = Tracker(program, join, granularity, constant, unfollowed(program, constant))
    for node in program.graph.nodes:
        tracker.values[node] = apply_rule(tracker, node)
    return _channels(tracker)


# ---------------------------------------------------------------------- from labels to channels

WEIGHT_AS_TENSOR = "a layer's weight is also used as a tensor"


def _channels(found: Tracker) -> Channels:
    """Connected components, then groups."""
    channel_of, edges = _components(found)
    pinned = _pinned(found, channel_of)
    axes = tuple(
        Axis(s.node, s.role, tuple(s.tensors), channel_of[s.labels.numpy()], s.groups) for s in found.sites
    )
    joins = tuple(
        Join(n, axis, (channel_of[a.numpy()], channel_of[b.numpy()]), channel_of[out.numpy()])
        for n, axis, a, b, out in found.joins
    )
    _pin_unproduced(axes, joins, channel_of, pinned)
    balanced = tuple(Balance(node, channel_of[rows.numpy()], spare) for node, rows, spare in found.rows)
    return Channels(
        program=found.program,
        join=found.join,
        granularity=found.granularity,
        axes=axes,
        groups=_groups(axes, joins, pinned, channel_of, edges, balanced),
        joins=joins,
        pinned=pinned,
        channel_of=channel_of,
        values=found.values,
        second={n: (axis, channel_of[labels.numpy()]) for n, (axis, labels) in found.second.items()},
        balanced=balanced,
        mixings=tuple(
            Mixing(node, source, axis, channel_of[labels.numpy()], how, args)
            for node, source, axis, labels, how, args in found.mixings
        ),
    )


def _components(found: Tracker) -> tuple[Ints, list[tuple[str, Ints]]]:
    edges = [(node, a.numpy(), b.numpy()) for node, a, b in found.edges]
    loose = np.ones(found.count, bool)  # what may go, or is of a layer: all but tables of positions
    for _, _, labels, axis in found.pins:
        if axis is None:
            loose[labels.numpy()] = False
    for site in found.sites:
        loose[site.labels.numpy()] |= site.role != "tensor"
    whole = [(node, labels.numpy()) for node, labels in found.rectangular]
    whole = [(node, labels) for node, labels in whole if loose[labels].any()]
    while True:
        a = np.concatenate([e[1] for e in edges] or [np.zeros(0, np.int64)])
        b = np.concatenate([e[2] for e in edges] or [np.zeros(0, np.int64)])
        channel_of = components(found.count, a, b)
        more = [e for node, labels in whole for e in _ties(node, channel_of[labels])]
        if not more:
            return channel_of, [(node, channel_of[ends]) for node, ends, _ in edges]
        edges += more


def _pinned(found: Tracker, channel_of: Ints) -> dict[int, tuple[str, str]]:
    pinned: dict[int, tuple[str, str]] = {}
    whole = {tensor for tensor, dim in found.site_of if dim == ELEMENTS}
    for (tensor, _), index in found.site_of.items():
        if tensor in whole and len([k for k in found.site_of if k[0] == tensor]) > 1:
            site = found.sites[index]
            found.pins.append((site.node, WEIGHT_AS_TENSOR, site.labels.flatten(), None))
    for (tensor, _), index in found.site_of.items():
        if tensor in found.frozen:
            site = found.sites[index]
            found.pins.append((site.node, WEIGHT_AS_TENSOR, site.labels.flatten(), None))
    for node, reason, labels, axis in found.pins:
        ids = channel_of[labels.numpy()]
        if axis is not None and (ids == ids[:1]).all():
            continue  # a number that no removal changes
        for channel in _different(ids, len(channel_of)).tolist():
            if channel:
                pinned.setdefault(channel, (node, reason))
    return pinned


def _different(channels: Ints, size: int) -> Ints:
    """The channels among these, ascending: a table of positions has more elements than there are channels."""
    if channels.size < size:
        return np.unique(channels)
    seen = np.zeros(size, bool)
    seen[channels] = True
    return np.flatnonzero(seen)


def _pin_unproduced(
    axes: Iterable[Axis],
    joins: Iterable[Join],
    channel_of: Ints,
    pinned: dict[int, tuple[str, str]],
) -> None:
    """Channels that no layer produces have nothing to score; a join's operands decide its sums."""
    size = len(channel_of)
    made, summed = np.zeros(size, bool), np.zeros(size, bool)
    for axis in axes:
        if axis.role == "out":
            made[axis.channels] = True
    for join in joins:
        summed[join.result] = True
    for axis in axes:
        if not (made | summed)[axis.channels].all():
            for channel in np.unique(axis.channels[~(made | summed)[axis.channels]]).tolist():
                if channel:
                    pinned.setdefault(channel, (axis.node, "no layer produces these channels"))
    for channel in np.flatnonzero(made & summed).tolist():
        pinned.setdefault(channel, ("join", "a sum that is padded is coupled with a layer's own channels"))


def _ties(node: str, channels: Ints) -> list[tuple[str, Ints, Ints]]:
    """Edges that leave only hyperplanes of one axis apart: the longest, of equals the innermost-counting.

    Before that one along which most is tied already: all but the rows of a table that nobody reads.
    """
    varies = [d for d in range(channels.ndim) if (channels != channels.take([0], axis=d)).any()]
    if len(varies) < 2:
        return []
    step = {d: int(abs(np.diff(channels.take([0, 1], axis=d), axis=d).flat[0])) for d in varies}
    planes = {d: np.moveaxis(channels, d, 0).reshape(channels.shape[d], -1) for d in varies}
    tied = {d: bool((flat[:, 1:] == flat[:, :1]).mean() > 0.5) for d, flat in planes.items()}
    axis = max(varies, key=lambda d: (tied[d], channels.shape[d], -step[d]))
    flat = planes[axis]
    first = np.broadcast_to(flat[:, :1], flat.shape)
    return [(node, first.flatten(), flat.flatten())]


def _groups(
    axes: Sequence[Axis],
    joins: Sequence[Join],
    pinned: dict[int, tuple[str, str]],
    channel_of: Ints,
    edges: Sequence[tuple[str, Ints]],
    balanced: Sequence[Balance],
) -> tuple[ChannelGroup, ...]:
    """Channels with the same set of axes (and the same reason to stay) form a group."""
    size = len(channel_of)
    random = np.random.default_rng(0)
    signature = np.zeros(size, np.uint64)
    for axis in axes:
        signature[np.unique(axis.channels)] ^= random.integers(1, 2**63, dtype=np.uint64)
    reasons = {r: random.integers(1, 2**63, dtype=np.uint64) for r in dict.fromkeys(pinned.values())}
    for channel, reason in pinned.items():
        signature[channel] ^= reasons[reason]
    produced = [a.channels for a in axes if a.role == "out"]
    derived = np.zeros(size, bool)
    for join in joins:
        derived[join.result] = True
    candidates = np.concatenate([*produced, *(j.result for j in joins)] or [np.zeros(0, np.int64)])
    members = candidates[np.sort(np.unique(candidates, return_index=True)[1])]
    members = members[members != 0]
    _, first, inverse = np.unique(signature[members], return_index=True, return_inverse=True)
    group_of = np.full(size, -1, np.int64)
    group_of[members] = np.argsort(np.argsort(first))[inverse]
    tied = _by_group(((node, ends) for node, ends in edges), group_of, len(first))
    readers = _by_group(((a.node, a.channels) for a in axes if a.role == "in"), group_of, len(first))
    producers: list[dict[str, Ints]] = [{} for _ in first]
    for axis in axes:
        if axis.role == "out":
            owner = group_of[axis.channels]
            for g in np.unique(owner[owner >= 0]).tolist():
                producers[g][axis.layer] = np.flatnonzero(owner == g)
    order = np.argsort(group_of[members], kind="stable")
    ends = np.cumsum(np.bincount(group_of[members], minlength=len(first)))
    rows = _row_signature(size, balanced)
    return tuple(
        ChannelGroup(
            name=next(iter(producers[g]), None) or (tied[g] or readers[g] or ["join"])[0],
            channels=block,
            producers=producers[g],
            readers=tuple(readers[g]),
            coupled_by=tuple(tied[g]),
            pinned=pinned.get(int(block[0])),
            blocks=np.unique(rows[block], return_inverse=True)[1],
            derived=bool(derived[block[0]]) and not producers[g],
        )
        for g, block in enumerate(np.split(members[order], ends[:-1]))
        if len(block)
    )


def _row_signature(size: int, balanced: Sequence[Balance]) -> NDArray[np.uint64]:
    """Channels that are in the same row of every balanced set have the same number."""
    random = np.random.default_rng(1)
    signature = np.zeros(size, np.uint64)
    for balance in balanced:
        for row in balance.rows:
            signature[np.unique(row)] ^= random.integers(1, 2**63, dtype=np.uint64)
    return signature


def _by_group(items: Iterable[tuple[str, Ints]], group_of: Ints, count: int) -> list[list[str]]:
    found: list[dict[str, None]] = [{} for _ in range(count)]
    for name, channels in items:
        for g in np.unique(group_of[channels]).tolist():
            if g >= 0:
                found[g][name] = None
    return [list(names) for names in found]
