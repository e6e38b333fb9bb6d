"""What stays of the error once the rest of a layer has made up for the channels that it lost.

A reader computes W a. Without the columns S, and with the others K fitted again, the squared error of its
outputs, weighted by f (`measure.output_weights`), is at least

    e(S) = tr W~_S [(H_SS)^-1] W~_S^T,    H = (G + ridge * mean diag G * I)^-1,    W~ = diag(sqrt f) W

and taking the channels away one after the other (Hassibi & Stork 1993, "optimal brain surgeon")

    W~ -= W~_c (H_cc)^-1 H_c:,    H -= H_:c (H_cc)^-1 H_c:                                     (METHODS 9.3)

adds these errors up. A group's loss is the sum over its readers: its channels have an order, it has a curve
of losses by width. Only the rows and columns of H that are the group's own have to be followed.

What one squared error at a layer does to the outputs depends on what is behind it; it is measured, once a
group (METHODS 9.4).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from graphcomp.base import distributed
from graphcomp.budget import Judgement, Scores
from graphcomp.channels import ChannelGroup, Channels, Ints
from graphcomp.data import Split
from graphcomp.ir import editable, evaluating, output_tensors
from graphcomp.measure import Gram, as_weight, grams, is_mixing, matrix, matrix_shape, output_weights
from graphcomp.pipeline import Context, require_data

SAMPLES, POSITIONS = 1000, 64
"""Whose patches are looked at, and at how many places of every map."""

RIDGE = 1e-3
"""Share of the mean energy of what a layer reads that is added to each column's."""

ENOUGH = 4
"""Rows a column below which second moments say too little (T9.1)."""

STEPS = 64
"""At most so many times channels are taken out of a group, so several at once of a wide one."""

WEIGHED, MEASURED = 64, 64
"""Samples that output weights are averaged over, and that sensitivities are measured on."""

TOO_FEW = "a layer that reads it has more columns than samples can tell apart"
UNEVEN = "a layer reads its channels unevenly often"
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
class Curve:
    """What narrowing a group loses.

    Attributes:
        order: positions in `group.channels`, the first to go first.
        lost: `[n + 1]`, by how many stay.
    """

    order: Ints
    lost: NDArray[np.float64]


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
    statistics = compensation_of(channels, context, name)
    unjudged = {g: reason for g in widths if (reason := statistics.why_unjudged(g)) is not None}
    curves = {g: statistics.curve(g, judgement.scores) for g in widths if g not in unjudged}
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


def compensation_of(channels: Channels, context: Context, name: str) -> "Compensation":
    """The same object whenever one pass asks for the same analysis."""
    if channels not in _KNOWN:
        _KNOWN[channels] = Compensation(channels, context, name, SAMPLES, POSITIONS)
    return _KNOWN[channels]


class Compensation:
    """Statistics of all readers, and the curves of groups."""

    def __init__(self, channels: Channels, context: Context, name: str, samples: int, positions: int) -> None:
        self.channels, self.program, self.context = channels, channels.program, context
        data = require_data(name, context)
        fit, self.held_out = _parts(data.train, samples, context.seed)
        self.readers = _readers(channels)
        layers = list(dict.fromkeys(r.layer for r in self.readers))
        enough = [n for n in layers if self._rows(n, len(fit), positions) >= ENOUGH * self._shape(n)[2]]
        self.grams: dict[str, Gram] = grams(
            self.program,
            fit,
            enough,
            positions=positions,
            seed=context.seed,
            memory=context.memory,
            progress=context.progress,
        )
        some = fit.subset(np.arange(min(WEIGHED, len(fit))))
        self.weights = output_weights(
            self.program, some, enough, seed=context.seed, progress=context.progress
        )
        self._inverses: dict[tuple[str, int], Tensor] = {}

    def _shape(self, layer: str) -> tuple[int, int, int]:
        return matrix_shape(self.program.layer(layer))

    def _rows(self, layer: str, samples: int, positions: int) -> int:
        node = next(n for n in self.program.graph.nodes if n.op == "call_module" and n.target == layer)
        shape = self.program.shape(node) or ()
        plane = shape[1:-1] if isinstance(self.program.layer(layer), nn.Linear) else shape[2:]
        return samples * min(int(np.prod(plane)), positions)

    def why_unjudged(self, group: ChannelGroup) -> str | None:
        """Why there is no curve for a group; None if there is one."""
        found = self._of(group)
        if not found:
            return UNREAD
        if any(reader.layer not in self.grams for reader, _, _ in found):
            return TOO_FEW
        return UNEVEN if any(columns is None for _, _, columns in found) else None

    def _of(self, group: ChannelGroup) -> list[tuple[_Reader, Ints, Tensor | None]]:
        """Readers of a group: which of its channels they read, and their columns `[channels, m]`."""
        ids = _summed(self.channels, group)
        found = []
        for reader in self.readers:
            at = ids[reader.channels]
            present = np.unique(at[at >= 0])
            if not len(present):
                continue
            places = [np.flatnonzero(at == p) for p in present]
            columns = None
            if len({len(p) for p in places}) == 1:
                taps = torch.arange(reader.taps)
                starts = torch.from_numpy(np.stack(places)) * reader.taps
                columns = (starts.unsqueeze(2) + taps).flatten(1)
            found.append((reader, present, columns))
        return found

    def _inverse(self, reader: _Reader) -> Tensor:
        key = (reader.layer, reader.block)
        if key not in self._inverses:
            self._inverses = {k: v for k, v in self._inverses.items() if k[0] == reader.layer}
            gram = self.grams[reader.layer].matrix[reader.block].clone()
            gram.diagonal().add_(max(RIDGE * float(gram.diagonal().mean()), 1e-12))
            self._inverses[key] = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        return self._inverses[key]

    def curve(self, group: ChannelGroup, scores: Scores | None = None) -> Curve:
        """Order and losses of a group that can be judged.

        Args:
            group: see `why_unjudged`.
            scores: importance by channel id, to go by instead of by what stays of the error.
        """
        parts = []
        for reader, present, columns in self._of(group):
            flat = cast(Tensor, columns).flatten()
            w = matrix(self.program.layer(reader.layer))[reader.block]
            f = self.weights[reader.layer].reshape(-1, len(w))[reader.block]
            h = self._inverse(reader)[flat][:, flat]
            parts.append(_Part(present, h, f.sqrt().unsqueeze(1) * w[:, flat]))
        given = None if scores is None else scores[group.channels]
        return eliminate(parts, group.blocks, given)

    def sensitivities(self, curves: dict[ChannelGroup, tuple[Curve, int]]) -> dict[ChannelGroup, float]:
        """How much the outputs move, per unit of the curve's loss, once readers have made up for it.

        Args:
            curves: every group's curve, and the width to which it is narrowed for the measurement.
        """
        return distributed.broadcast(_Measurement(self, curves).run())


def _parts(split: Split, samples: int, seed: int) -> tuple[Split, Split]:
    """Samples for statistics and others for measurements, evenly spaced and in random order."""
    count = min(samples + MEASURED, len(split))
    order = np.random.default_rng(seed).permutation(np.arange(count) * len(split) // count)
    held = min(MEASURED, max(1, count // 4))
    return split.subset(order[held:]) if count > held else split.subset(order), split.subset(order[:held])


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


def _summed(channels: Channels, group: ChannelGroup) -> Ints:
    """Channel id -> position in the group, -1 for others; sums of padded operands count as their operands."""
    position = np.full(len(channels.channel_of), -1, np.int64)
    position[group.channels] = np.arange(len(group.channels))
    for join in channels.joins:  # operands come before their sums
        for operand in join.operands:
            own = position[operand]
            position[join.result] = np.where(own >= 0, own, position[join.result])
    return position


@dataclass(eq=False)
class _Part:
    """What one reader still has of a group.

    Attributes:
        channels: positions in the group, `[n]`.
        h, w: H and W~ of their columns, `[n * m, n * m]` and `[o, n * m]`.
    """

    channels: Ints
    h: Tensor
    w: Tensor

    def scores(self) -> Tensor:
        """e of each channel by itself, `[n]`."""
        n = len(self.channels)
        blocks = self.h.reshape(n, -1, n, self.h.shape[1] // n)
        diagonal = torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)
        w = self.w.reshape(len(self.w), n, -1).permute(1, 2, 0)
        half = torch.linalg.solve_triangular(_root(diagonal), w, upper=False)
        return cast(Tensor, half.square().sum((1, 2)))

    def without(self, gone: Ints) -> float:
        """Take channels out; what that adds to the error."""
        n = len(self.channels)
        is_gone = np.isin(self.channels, gone)
        if not is_gone.any():
            return 0.0
        m = self.h.shape[0] // n
        mask = torch.from_numpy(np.repeat(is_gone, m))
        s, k = torch.nonzero(mask).flatten(), torch.nonzero(~mask).flatten()
        root = _root(self.h[s][:, s])
        half_w = torch.linalg.solve_triangular(root, self.w[:, s].T, upper=False)
        half_h = torch.linalg.solve_triangular(root, self.h[s][:, k], upper=False)
        self.w = self.w[:, k] - half_w.T @ half_h
        self.h = torch.addmm(self.h[k][:, k], half_h.T, half_h, alpha=-1)
        self.channels = self.channels[~is_gone]
        return float(half_w.square().sum())


def _root(matrices: Tensor) -> Tensor:
    """Cholesky factors; of a matrix that rounding made indefinite with as much added as that takes."""
    found, flaw = torch.linalg.cholesky_ex(matrices)
    level = 1e-12
    while bool(flaw.any()):
        damped = matrices.clone()
        scale = matrices.diagonal(dim1=-2, dim2=-1).abs().mean(-1, keepdim=True) + 1e-300
        damped.diagonal(dim1=-2, dim2=-1).add_(level * scale)
        found, flaw = torch.linalg.cholesky_ex(damped)
        level *= 100
    return cast(Tensor, found)


def eliminate(parts: Sequence[_Part], blocks: Ints, given: NDArray[np.float64] | None = None) -> Curve:
    """Take channels out of all readers, as many of every block, those first that cost least now.

    Args:
        parts: of the readers; used up.
        blocks: `[n]`, the block of every channel.
        given: `[n]`, an importance to go by instead.
    """
    n, count = len(blocks), int(blocks.max()) + 1
    at_once = max(1, n // count // STEPS)
    alive = np.ones(n, bool)
    order: list[int] = []
    widths, losses = [n], [0.0]
    while alive.any():
        if given is None:
            now = np.zeros(n)
            for part in parts:
                if len(part.channels):
                    np.add.at(now, part.channels, part.scores().numpy())
        else:
            now = given
        gone: list[int] = []
        for block in range(count):
            members = np.flatnonzero(alive & (blocks == block))
            gone += members[np.argsort(now[members], kind="stable")][:at_once].tolist()
        order += sorted(gone, key=lambda i: now[i])
        alive[gone] = False
        losses.append(losses[-1] + sum(part.without(np.array(gone)) for part in parts))
        widths.append(int(alive.sum()))
    lost = np.interp(np.arange(n + 1), widths[::-1], losses[::-1])
    return Curve(np.array(order), lost)


# ---------------------------------------------------------------------- sensitivities


class _Measurement(fx.Interpreter):
    """Runs held-out samples, and again from each group's first reader on with that group narrowed."""

    def __init__(self, statistics: Compensation, curves: dict[ChannelGroup, tuple[Curve, int]]) -> None:
        self.statistics, self.curves = statistics, curves
        self.small = editable(statistics.program)
        super().__init__(self.small)
        self.offsets: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self) -> dict[ChannelGroup, float]:  # type: ignore[override]
        """Squared distance of centred outputs, a sample, over the curve's loss."""
        split = self.statistics.held_out
        nodes = list(self.small.graph.nodes)
        due: dict[int, list[ChannelGroup]] = {}
        changes = {group: self._change(group) for group in self.curves}
        for group, change in changes.items():
            first = next(i for i, n in enumerate(nodes) if n.op == "call_module" and n.target in change)
            due.setdefault(first, []).append(group)
        moved = dict.fromkeys(self.curves, 0.0)
        with evaluating(self.small):
            for x, _ in split.batches(32):
                self.args_iter = iter([x])
                env: dict[fx.Node, Any] = {}
                last = _last_use(nodes)
                outputs: dict[ChannelGroup, Tensor] = {}
                for i, node in enumerate(nodes):
                    for group in due.get(i, ()):
                        outputs[group] = self._rest(nodes[i:], _cloned(env), changes[group], last)
                    self.env = env
                    env[node] = self.run_node(node)
                    for dead in last.get(node, ()):
                        if node.op != "output":
                            env.pop(dead, None)
                base = _centred(env[nodes[-1]])
                for group, output in outputs.items():
                    moved[group] += float((output - base).double().square().sum())
                self.statistics.context.progress("sensitivities", 0.9)
        found = {}
        for group, (curve, width) in self.curves.items():
            expected = float(curve.lost[width])
            found[group] = moved[group] / len(split) / expected if expected > 0 else 0.0
        return found

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """With what a reader's lost columns yielded on average."""
        value = super().call_module(target, args, kwargs)
        if target not in self.offsets:
            return value
        offset = self.offsets[target].to(value.dtype)
        if isinstance(self.fetch_attr(target), nn.Linear):
            return value + offset
        return value + offset.reshape(-1, *[1] * (value.ndim - 2))

    def _rest(
        self,
        nodes: Sequence[fx.Node],
        env: dict[fx.Node, Any],
        change: dict[str, tuple[Tensor, Tensor]],
        last: dict[fx.Node, list[fx.Node]],
    ) -> Tensor:
        """Outputs of a network with other readers, from here on."""
        before = {}
        for layer, (weight, offset) in change.items():
            own = cast(Tensor, self.small.get_submodule(layer).weight)
            before[layer] = own.detach().clone()
            own.copy_(weight)
            self.offsets[layer] = offset
        outer, self.env = getattr(self, "env", {}), env
        for node in nodes:
            env[node] = self.run_node(node)
            for dead in last.get(node, ()):
                if node.op != "output":
                    env.pop(dead, None)
        self.env = outer
        for layer, weight in before.items():
            cast(Tensor, self.small.get_submodule(layer).weight).copy_(weight)
        self.offsets.clear()
        return _centred(env[nodes[-1]])

    def _change(self, group: ChannelGroup) -> dict[str, tuple[Tensor, Tensor]]:
        """Reader -> its weight without the group's lost columns, the others fitted again, and the offset."""
        curve, width = self.curves[group]
        gone = curve.order[: len(group.channels) - width]
        changed: dict[str, tuple[Tensor, Tensor]] = {}
        layers: dict[str, Tensor] = {}
        offsets: dict[str, Tensor] = {}
        for reader, present, columns in self.statistics._of(group):
            module = self.small.get_submodule(reader.layer)
            w = layers.setdefault(reader.layer, matrix(module))
            offset = offsets.setdefault(reader.layer, torch.zeros(w.shape[:2], dtype=torch.float64))
            s = cast(Tensor, columns)[torch.from_numpy(np.isin(present, gone))].flatten()
            if not len(s):
                continue
            gram, block = self.statistics.grams[reader.layer], reader.block
            kept = torch.ones(w.shape[2], dtype=torch.bool)
            kept[s] = False
            k = torch.nonzero(kept).flatten()
            new = torch.zeros_like(w[block])
            g = gram.matrix[block]
            inner = g[k][:, k].clone()
            inner.diagonal().add_(max(RIDGE * float(g.diagonal().mean()), 1e-12))
            back = torch.cholesky_solve(g[k][:, s] @ w[block][:, s].T, torch.linalg.cholesky(inner)).T
            new[:, k] = w[block][:, k] + back
            offset[block] = (w[block] - new) @ gram.mean[block]
            w[block] = new
        for layer, w in layers.items():
            module = self.small.get_submodule(layer)
            changed[layer] = as_weight(module, w), offsets[layer].flatten()
        return changed


def _cloned(env: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Copies that changes in place do not reach; views of one memory stay views of one."""
    memo: dict[int, Any] = {}
    found: dict[fx.Node, Any] = {}
    for node, value in env.items():
        if isinstance(value, Tensor):
            found[node] = memo.setdefault(id(value), value.clone())
        else:
            found[node] = value
    return found


def _centred(output: Any) -> Tensor:
    z = torch.cat([t.flatten(1) for t in output_tensors(output)], 1)
    return z - z.mean(1, keepdim=True)


def _last_use(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            last[source] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for source, user in last.items():
        found.setdefault(user, []).append(source)
    return found


_KNOWN: WeakKeyDictionary[Channels, Compensation] = WeakKeyDictionary()
