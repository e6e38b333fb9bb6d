"""Taking channels out of the layers that read them, with the others fitted again each time.

A reader computes W a. Without the columns S, and with the others K fitted again, the squared error of its
outputs, weighted by f (`measure.output_weights`), is at least

    e(S) = tr W~_S [(H_SS)^-1] W~_S^T,    H = (G + ridge * mean diag G * I)^-1,    W~ = diag(sqrt f) W

and taking the channels away one after the other (Hassibi & Stork 1993, "optimal brain surgeon")

    W~ -= W~_c (H_cc)^-1 H_c:,    H -= H_:c (H_cc)^-1 H_c:                                     (METHODS 9.3)

adds these errors up. Of H and W~ only the rows and columns of the channels in question have to be followed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcomp.channels import Ints
from graphcomp.measure import root

RIDGE = 1e-3
"""Share of the mean energy of what a layer reads that is added to each column's."""

FLOOR = 1e-12
"""Least of what is added: where nothing varies nothing is divided by zero."""

STEPS = 64
"""At most so many times channels are taken out of a group, so several at once of a wide one."""


@dataclass(frozen=True, eq=False)
class Curve:
    """What narrowing a group loses.

    Attributes:
        order: positions in `group.channels`, the first to go first.
        lost: `[n + 1]`, by how many stay.
    """

    order: Ints
    lost: NDArray[np.float64]


@dataclass(eq=False)
class Part:
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
        half = torch.linalg.solve_triangular(root(diagonal), w, upper=False)
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
        lower = root(self.h[s.unsqueeze(1), s])
        half_w = torch.linalg.solve_triangular(lower, self.w[:, s].T, upper=False)
        half_h = torch.linalg.solve_triangular(lower, self.h[s.unsqueeze(1), k], upper=False)
        self.w = self.w[:, k] - half_w.T @ half_h
        self.h = self.h[k.unsqueeze(1), k].addmm_(half_h.T, half_h, alpha=-1)
        self.channels = self.channels[~is_gone]
        return float(half_w.square().sum())


def eliminate(parts: Sequence[Part], blocks: Ints, given: NDArray[np.float64] | None = None) -> Curve:
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


def best_without(w: Tensor, gram: Tensor, s: Tensor) -> Tensor:
    """W without the columns s, the others fitted again: W_K + W_S G_SK (G_KK + ridge)^-1 (METHODS 9.4)."""
    kept = torch.ones(w.shape[1], dtype=torch.bool)
    kept[s] = False
    k = torch.nonzero(kept).flatten()
    inner = _damp(gram[k.unsqueeze(1), k], float(gram.diagonal().mean()))
    lost = gram[k.unsqueeze(1), s] @ w[:, s].T
    new = torch.zeros_like(w)
    new[:, k] = w[:, k] + torch.cholesky_solve(lost, torch.linalg.cholesky(inner)).T
    return new


def removal_order(w: Tensor, gram: Tensor, f: Tensor, channels: int) -> Curve:
    """In which order one layer may stop reading channels, and what is lost by how many it reads (9.3).

    Args:
        w, gram, f: W `[o, K]`, G `[K, K]` and f `[o]`, float64.
        channels: of K columns.
    """
    reader = Part(np.arange(channels), inverse(gram), f.sqrt().unsqueeze(1) * w)
    return eliminate([reader], np.zeros(channels, np.int64))


def inverse(gram: Tensor) -> Tensor:
    """H = (G + ridge * mean diag G * I)^-1."""
    lower = torch.linalg.cholesky(_damp(gram.clone(), float(gram.diagonal().mean())))
    return torch.cholesky_inverse(lower)


def _damp(gram: Tensor, level: float) -> Tensor:
    """G with a part of the mean energy of what a layer reads added to its diagonal, in place."""
    gram.diagonal().add_(max(RIDGE * level, FLOOR))
    return gram
