"""MSHC, multi-step heuristic compression: in which order the units of a layer go, and where to stop.

A unit counts what its removal loses, plus what the next removal would then lose on average:

    P_o = I(X_o) + gamma / (N - 1) * sum_{i != o} I(X_o minus i),     N units are left           (METHODS 1.4)
    the sum = (N - 1) I(X_o) - 4 S[G2 D_o X_o] + S[G2 X_o^2] + S[G2 * sum_i s_i^2 (u_i^2) (v_i^2)^T]    (1.5)

with G2 = G * G, D_o = X_o - W and the triples of X_o. For a direction these are those of X without one. For a
channel they are new: with X = U Y they come from the eigenvectors Q of Y Y^T - Y_o Y_o^T, which is R x R,

    last term = sum_i sum_ax (U Q)_ai^2 G2_ax (Q^T Y)_ix^2    over the columns x of the other channels.

All candidates are evaluated at once. A layer takes O((c + r) / T) steps of O(c (R^3 + n R c k)) each, where
(1.4) as it stands takes O((c + r)^2) singular value decompositions a step.

"held" keeps the triples of X for the channels' last term, which is then as cheap as all other terms together,
O(n R c k) a step. It is for layers so large that the exact term would take hours. On a trained ResNet-56 at
rate 0.5, where both can be had, it changes the order in most layers and the loss of all together by 0.02 %.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graphcomp.passes.cc.units import Remainder, Unit, WeightShape

Lookahead = Literal["auto", "exact", "held"]

CHUNK = 1 << 21
"""Numbers in the largest array that a batch of candidates takes: 16 MiB."""

AUTO_LIMIT = 1e12
"""Multiplications that the exact lookahead of a layer may take, about a minute, before "auto" holds."""


def step_size(shape: WeightShape, step: int | None) -> int:
    """T, the units that go after one evaluation: by default 1 % of all, at least 1."""
    return step or max(1, shape.units // 100)


def is_exact(shape: WeightShape, lookahead: Lookahead, step: int | None) -> bool:
    """Whether the channels' last term is computed exactly for a layer of this shape."""
    if lookahead != "auto":
        return lookahead == "exact"
    n, c, r = shape.outputs, shape.channels, shape.directions
    once = c * r * (10 * r * r + n * r + r * c * shape.kernel + n * c * shape.kernel)
    return once * shape.units / (3 * step_size(shape, step)) <= AUTO_LIMIT  # 3: the layer shrinks meanwhile


def importances(state: Remainder, gamma: float, exact: bool = True) -> Tensor:
    """P of every unit that is left, in the order of `state.units`."""
    parts = state.parts()
    g2, x, d = state.importance, state.current, state.current - state.original
    dd, dx, xx, ww = (
        (g2 * a * b).sum((0, 2)) for a, b in ((d, d), (d, x), (x, x), (state.original, state.original))
    )
    own = parts.sum(1)  # S[G2 (s u v^T)^2]
    ud, ux = (_projections(state, g2 * m) for m in (d, x))
    loss = torch.cat([state.loss - dd + ww, state.loss - 2 * ud + own])
    others = loss.numel() - 1
    if others < 1:
        return loss
    cross = torch.cat([dx.sum() - dx, dx.sum() - ux - ud + own])
    square = torch.cat([xx.sum() - xx, xx.sum() - 2 * ux + own])
    channels = channel_spectra(state) if exact else own.sum() - parts.sum(0)
    spectra = torch.cat([channels, own.sum() - own])
    importance: Tensor = loss + gamma / others * (others * loss - 4 * cross + square + spectra)
    return importance


def _projections(state: Remainder, matrix: Tensor) -> Tensor:
    """S[M * s u v^T] = u^T M (s v) of every direction, (R,)."""
    projected: Tensor = (state.left.T @ matrix.flatten(1)) * state.right.flatten(1)
    return projected.sum(1)


def channel_spectra(state: Remainder) -> Tensor:
    """The last term of (1.5) for X without each of its channels, (channels,)."""
    rank, channels, kernel = state.right.shape
    largest = rank * max(rank, state.shape.outputs, channels * kernel)
    candidates = torch.arange(channels, device=state.right.device)
    batches = torch.split(candidates, max(1, CHUNK // largest))
    return torch.cat([_spectra(state, some) for some in batches])


def _spectra(state: Remainder, candidates: Tensor) -> Tensor:
    flat, g2 = state.right.flatten(1), state.importance.flatten(1)
    rank, channels, kernel = state.right.shape
    lost = state.right[:, candidates].movedim(1, 0)  # (candidates, R, k)
    basis = torch.linalg.eigh(torch.diag(flat.square().sum(1)) - lost @ lost.mT).eigenvectors
    weighted = (state.left @ basis).square_().mT.reshape(-1, len(g2)) @ g2
    right = basis.mT.reshape(-1, rank) @ flat
    parts: Tensor = weighted.mul_(right.square_()).reshape(-1, rank, channels, kernel).sum((1, 3))
    return parts.sum(1) - parts.gather(1, candidates[:, None]).squeeze(1)


class Search:
    """The order in which the units of one layer go; it does not depend on how many will.

    Args:
        weight, gradient: (n, c, ...), of equal shapes.
        gamma: weight of the lookahead.
        step: T; None for the default.
        lookahead: see the module.
        units: what an earlier search over the same layer found; this one goes on from there.
    """

    def __init__(
        self,
        weight: Tensor,
        gradient: Tensor,
        gamma: float = 0.9,
        step: int | None = None,
        lookahead: Lookahead = "auto",
        units: Sequence[Unit] = (),
    ) -> None:
        self.state = Remainder(weight, gradient, units)
        self.units = list(units)
        self.gamma, self.step = gamma, step_size(self.state.shape, step)
        self.exact = is_exact(self.state.shape, lookahead, step)

    def advance(self) -> bool:
        """Remove the next T units; False if only one channel and one direction are left, which stay."""
        state, before = self.state, len(self.units)
        candidates = [u for u in state.units if state.removable(u)]
        if not candidates:
            return False
        scores = importances(state, self.gamma, self.exact).tolist()
        by_unit = dict(zip(state.units, scores, strict=True))
        for unit in sorted(candidates, key=by_unit.__getitem__):  # stable: channels before directions
            if state.removable(unit):
                state.remove(unit)
                self.units.append(unit)
            if len(self.units) - before == self.step:
                break
        return True


@dataclass(frozen=True)
class Compression:
    """What a layer becomes.

    Attributes:
        keep: input channels that are read, ascending.
        rank: of the two factors; None for one weight.
        removed: how many units of the search's order have gone.
        macs: for one position of the output.
    """

    keep: tuple[int, ...]
    rank: int | None
    removed: int
    macs: int


def round_up(count: int, multiple: int, limit: int) -> int:
    """The next multiple, or the limit if that is lower."""
    return min(limit, -(-count // multiple) * multiple)


def states(
    shape: WeightShape, units: Sequence[Unit], multiple: int = 1
) -> Iterator[tuple[int, int, int | None, int]]:
    """(units gone, width, rank, MACs a position) along an order of removal, for every form of every state.

    A state can be factored if a direction is gone and can be one weight if a channel is (or if no direction
    is): two forms that METHODS 1.4 looks at in this order. Widths and ranks are rounded up to `multiple`.
    """
    channels, directions = shape.channels, shape.directions
    yield 0, channels, None, shape.macs()
    for gone, unit in enumerate(units, 1):
        if unit < shape.channels:
            channels -= 1
        else:
            directions -= 1
        width = round_up(channels, multiple, shape.channels)
        if directions < shape.directions:
            rank = round_up(directions, multiple, shape.directions)
            yield gone, width, rank, shape.macs(width, rank)
        if channels < shape.channels:
            yield gone, width, None, shape.macs(width)


def first_form(
    shape: WeightShape, units: Sequence[Unit], goal: float, multiple: int = 1
) -> Compression | None:
    """The first form along an order of removal whose MACs are at most `goal`; None if none is.

    Args:
        shape, goal: MACs are counted for one position of the output.
        units: see `Search`.
        multiple: see `states`. The channels that went last are taken back to round up.
    """
    for gone, width, rank, macs in states(shape, units, multiple):
        if macs <= goal:
            return Compression(_kept(shape, units[:gone], width), rank, gone, macs)
    return None


def step_back(shape: WeightShape, units: Sequence[Unit], form: Compression, multiple: int = 1) -> Compression:
    """The form that a slightly larger goal would have led to; the same one if nothing is gone from it."""
    earlier = [macs for gone, _, _, macs in states(shape, units, multiple) if gone < form.removed]
    return first_form(shape, units, min(earlier), multiple) or form if earlier else form


def _kept(shape: WeightShape, units: Sequence[Unit], width: int) -> tuple[int, ...]:
    gone = [u for u in units if u < shape.channels]
    return tuple(sorted(set(range(shape.channels)) - set(gone[: shape.channels - width])))


def least_macs(shape: WeightShape, multiple: int = 1) -> int:
    """The fewest MACs a position that any form of a layer has: one channel or one direction, rounded up."""
    width, rank = (
        round_up(1, multiple, shape.channels),
        round_up(1, multiple, shape.directions),
    )
    return min(shape.macs(), shape.macs(width), shape.macs(width, rank))
