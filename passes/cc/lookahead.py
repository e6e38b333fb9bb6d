"""What every unit of a layer counts: its loss, and what the next removal would lose on average (1.4, 1.5)."""

import torch
from torch import Tensor

from graphcomp.passes.cc.units import Remainder

CHUNK = 1 << 21
"""Numbers in the largest array that a batch of candidates takes: 16 MiB."""


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
