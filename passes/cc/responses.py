"""What a layer that reads fewer channels, or has a lower rank, loses of its responses; and which form pays.

Of all weights that read the channels K and have rank R, the best one leaves of what the layer computes

    lost(K, R) = e(K) + sum of the eigenvalues behind the R-th of  sqrt(f) P G_KK P^T sqrt(f)

with e(K) what stays once the channels that are left make up for the others (`bases.elimination`, METHODS 9.3)
and P the weights that do: what a regression leaves is uncorrelated with all that K says, so that the two add
up (9.6). Channels go in the order of 9.3. Times how far such an error moves the outputs, measured once a
layer on other samples (9.4), losses of layers add up, and MACs are bought greedily.

As by its own rule weights are those of the original, cut; `refit` behind this pass makes them the best ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcomp.base import distributed, part
from graphcomp.bases import best_without, movements, reading, removal_order
from graphcomp.channels import round_within
from graphcomp.factors import Factor, layer_macs
from graphcomp.ir import Program
from graphcomp.measure import as_weight, matrix
from graphcomp.passes.cc.units import WeightShape
from graphcomp.pipeline import Context

WIDTHS = 16
"""At most so many widths of a layer are looked at."""

LEAST = 1e-12
"""A step loses at least this, so that there is always a best one."""


@dataclass(frozen=True)
class Form:
    """What a layer may become: the channels that it reads, its rank (None: one weight), MACs a position."""

    keep: tuple[int, ...]
    rank: int | None
    macs: int


@dataclass(frozen=True, eq=False)
class Forms:
    """The forms of a layer that lose least for their MACs, from the whole layer down.

    Attributes:
        layer, shape: which one.
        macs: of all its calls as it is, for one sample.
        forms, lost: with what each loses, ascending; the first is the layer as it is and loses nothing.
    """

    layer: str
    shape: WeightShape
    macs: int
    forms: list[Form]
    lost: NDArray[np.float64]

    @property
    def saved(self) -> NDArray[np.float64]:
        """MACs that every form saves."""
        return self.macs * (1 - np.array([form.macs for form in self.forms]) / self.shape.macs())


def forms_of(
    w: Tensor, gram: Tensor, f: Tensor, shape: WeightShape, multiple: int, ceiling: float
) -> Iterator[tuple[Form, float, Tensor]]:
    """All forms with what each loses, and the weight `[o, K]` that loses so little.

    Args:
        w, gram, f: W `[o, K]`, G `[K, K]` and f `[o]`, float64.
        shape: of the layer; K = channels * kernel.
        multiple: of widths and ranks.
        ceiling: of the layer's MACs, at most, that go.
    """
    curve = removal_order(w, gram, f, shape.channels)
    widths = np.unique([round_within(n, multiple, shape.channels) for n in range(1, shape.channels + 1)])
    some = np.unique(np.linspace(0, len(widths) - 1, min(WIDTHS, len(widths))).round().astype(int))
    ranks = np.unique([round_within(n, multiple, shape.directions) for n in range(1, shape.directions + 1)])
    least, root = (
        (1 - ceiling) * shape.macs(),
        f.clamp(min=float(f.max()) * LEAST + 1e-300).sqrt().unsqueeze(1),
    )
    for width in widths[some].tolist():
        gone = curve.order[: shape.channels - width]
        columns = torch.from_numpy(gone).unsqueeze(1) * shape.kernel + torch.arange(shape.kernel)
        fitted = best_without(w, gram, columns.flatten()) if len(gone) else w
        keep = tuple(sorted(set(range(shape.channels)) - set(gone.tolist())))
        lost = float(curve.lost[width])
        if shape.macs(width) >= least:
            yield Form(keep, None, shape.macs(width)), lost, fitted
        scaled = root * fitted
        values, vectors = torch.linalg.eigh(scaled @ gram @ scaled.T)
        tails = values.clamp(min=0).cumsum(0)
        for rank in ranks[ranks < len(w)].tolist():
            cost = shape.macs(width, rank)
            if least <= cost < shape.macs(width):
                leading = vectors[:, -rank:]
                near = leading @ (leading.T @ scaled) / root
                yield Form(keep, rank, cost), lost + float(tails[len(w) - rank - 1]), near


def response_forms(
    program: Program, layers: Sequence[str], context: Context, name: str, multiple: int, ceiling: float
) -> tuple[list[Forms], dict[str, str]]:
    """The forms of layers of one group, and why others have none; collective.

    Raises:
        DataError: no samples.
    """
    seen = reading(program, context, name, layers)
    found, changes, expected = list[Forms](), {}, {}
    for layer, gram in seen.grams.items():
        module = program.layer(layer)
        w, g = matrix(module)[0], gram.matrix[0]
        shape = WeightShape.of(program.tensors[f"{layer}.weight"])
        every = list(forms_of(w, g, seen.weights[layer], shape, multiple, ceiling))
        best = _frontier(every)
        half = min(best, key=lambda i: abs(every[i][0].macs - shape.macs() / 2))
        if every[half][1] > 0:
            offset = (w - every[half][2]) @ gram.mean[0]
            changes[layer] = {layer: (as_weight(module, every[half][2].unsqueeze(0)), offset)}
            expected[layer] = every[half][1]
        whole = layer_macs(program, Factor(layer=layer))
        lost = np.array([every[i][1] for i in best])
        found.append(Forms(layer, shape, whole, [every[i][0] for i in best], lost))
    tell = part(context.progress, 0.7, 0.3)
    moved = distributed.on_first(
        lambda: movements(program, seen.held_out, changes, context.memory // 4, tell)
    )
    for forms in found:
        if forms.layer in moved:
            forms.lost[:] *= moved[forms.layer] / expected[forms.layer]
    return found, {layer: f"it {why}" for layer, why in seen.unread.items()}


def _frontier(every: Sequence[tuple[Form, float, Tensor]]) -> list[int]:
    """The whole layer, and those that nothing loses less than at as few MACs, by falling MACs."""
    whole = max(range(len(every)), key=lambda i: every[i][0].macs)
    best: list[int] = []
    for i in sorted(range(len(every)), key=lambda i: (every[i][0].macs, every[i][1])):
        if i != whole and (not best or every[i][1] < every[best[-1]][1]):
            best.append(i)
    return [whole, *best[::-1]]
