"""What ranks lose of a layer's responses, instead of its weight, in units of the network's outputs.

Of all W_r of rank r the outputs W a are kept best by U U^T W, with U the leading eigenvectors of the outputs'
second moments, each output weighted by how much it moves those of the network (METHODS 9.6):

    lost(r) = sum of the eigenvalues behind the r-th of   sqrt(f) W G W^T sqrt(f)

times what one such error moves the outputs by, measured once a layer at half of its rank on other samples
(METHODS 9.4). The factors themselves are those of the weight; `refit` behind this pass makes them the best
ones of their rank for the responses.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcomp.base import distributed, part
from graphcomp.bases import movements, reading
from graphcomp.ir import Program
from graphcomp.measure import Gram, as_weight, matrix
from graphcomp.pipeline import Context


def response_energies(
    program: Program, layers: Sequence[str], context: Context, name: str
) -> tuple[dict[str, NDArray[np.float64]], dict[str, str]]:
    """Eigenvalues by layer, largest first, as losses of the outputs, and why others have none; collective.

    Args:
        program: left as it is.
        layers: convolutions and linear layers of one group.
        context: holds the samples.
        name: of the pass that asks.
    """
    seen = reading(program, context, name, layers)
    found, changes, expected = {}, {}, {}
    for layer, gram in seen.grams.items():
        w = matrix(program.layer(layer))[0]
        values, directions = _spectrum(w, gram, seen.weights[layer])
        found[layer] = values
        half = max(1, min(w.shape) // 2)
        expected[layer] = float(values[half:].sum())
        if expected[layer] > 0:
            near = directions(half)
            offset = (w - near) @ gram.mean[0]
            changes[layer] = {layer: (as_weight(program.layer(layer), near.unsqueeze(0)), offset)}
    tell = part(context.progress, 0.7, 0.3)
    moved = distributed.on_first(
        lambda: movements(program, seen.held_out, changes, context.memory // 4, tell)
    )
    found = {n: v * (moved[n] / expected[n] if n in moved else 1.0) for n, v in found.items()}
    return found, {layer: f"it {why}" for layer, why in seen.unread.items()}


def _spectrum(w: Tensor, gram: Gram, f: Tensor) -> tuple[NDArray[np.float64], "_Nearest"]:
    scale = f.clamp(min=float(f.max()) * 1e-12 + 1e-300).sqrt().unsqueeze(1)
    scaled = scale * w
    values, vectors = torch.linalg.eigh(scaled @ gram.matrix[0] @ scaled.T)
    count = min(w.shape)
    return values.flip(0).clamp(min=0)[:count].numpy(), _Nearest(scaled, scale, vectors)


class _Nearest:
    """W of a lower rank whose outputs are closest to those of W."""

    def __init__(self, scaled: Tensor, scale: Tensor, vectors: Tensor) -> None:
        self.scaled, self.scale, self.vectors = scaled, scale, vectors

    def __call__(self, rank: int) -> Tensor:
        leading = self.vectors[:, -rank:]
        return leading @ (leading.T @ self.scaled) / self.scale
