"""What a network costs in time once layers are factors, or read a part of their channels: before it is built.

    a layer of rank R that reads K   picking K, if others need more of the tensor; then the factors' operators
    what makes the tensor            without the channels that nobody reads any more

The second line is `budget.remaining.Remaining`; that a layer which lost rows so may be cheaper as one weight
is `factors.surgery`'s rule. No weight is decomposed and no graph is changed, so that hundreds of choices can
be compared. Picking is priced by the whole tensor, as `budget.remaining` prices selections that exist.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import fx

from graphcomp.budget.calls import Call, Operator, calls
from graphcomp.budget.model import LatencyModel
from graphcomp.budget.remaining import Remaining
from graphcomp.channels import Channels, Removal, analyse
from graphcomp.factors import Factor, macs_after, ranks, removable
from graphcomp.ir import Program
from graphcomp.runtime import Kernel

Factors = Mapping[str, Factor]
"""By layer; a layer without one stays as it is."""

Read = tuple[fx.Node, tuple[int, ...]]
"""A tensor, and the channels of it that are read."""


class FactorCost:
    """Predicted milliseconds of a program after factors.

    Args:
        program: before.
        model: predicts its operators; what it does not know of `planned` it measures now.
        planned: the largest choice that is going to be asked about; others have fewer factors, or ones that
            are one weight in their place.
        multiple: as `factors.surgery.rewrite` is going to be told.

    Attributes:
        calls: that can change, in the order of `parts`.
    """

    def __init__(self, program: Program, model: LatencyModel, planned: Factors, multiple: int = 1) -> None:
        self.program, self.model, self.multiple = program, model, multiple
        self._calls = calls(program)
        plain = {layer: factor.as_one_weight() for layer, factor in planned.items()}
        found = [self.operators(choice) for choice in ({}, planned, plain)]
        self._moved = [
            i for i, (first, *others) in enumerate(zip(*found, strict=True)) if others != [first] * 2
        ]
        self.calls = [self._calls[i] for i in self._moved]
        model.prepare(operator for choice in found for i in self._moved for operator in choice[i])

    def parts(self, chosen: Factors) -> NDArray[np.float64]:
        """Milliseconds of what every call becomes, of those that can change."""
        found = self.operators(chosen)
        return np.array([sum(self.model.milliseconds(*o) for o in found[i]) for i in self._moved])

    def operators(self, chosen: Factors) -> list[list[Operator]]:
        """What every call of the network becomes; channels that several pick alike are the first one's."""
        picked: set[Read] = set()
        found = []
        for call, operator in zip(self._calls, self._widths(chosen), strict=True):
            factor = chosen.get(str(call.node.target)) if call.node.op == "call_module" else None
            found.append([operator] if factor is None else self._replaced(call, operator, factor, picked))
        return found

    def _widths(self, chosen: Factors) -> Sequence[Operator]:
        """Every call with the channels that somebody still reads."""
        if all(factor.keep is None for factor in chosen.values()):
            return [call.operator for call in self._calls]
        channels = self._channels
        wanted = Removal(channels, removable(channels, chosen, self.multiple))
        removal = wanted.legal(np.zeros(len(channels.channel_of)))
        return [o for o in self._remaining.operators(removal)[: len(self._calls)] if o is not None]

    @cached_property
    def _channels(self) -> Channels:
        return analyse(self.program)

    @cached_property
    def _remaining(self) -> Remaining:
        return Remaining(self._channels)

    def _replaced(self, call: Call, left: Operator, factor: Factor, picked: set[Read]) -> list[Operator]:
        kernel, into, out = left
        width = into if factor.keep is None else len(factor.keep)
        found = factored(kernel, width, out, _worthwhile(call, factor, width, out))
        if width < into:
            place = call.source, tuple(factor.keep or ())
            if place not in picked and len(self.program.shape(call.source) or ()) == 4:
                found.insert(0, (Kernel("move", kernel.plane), into, into))
            picked.add(place)
        return found


def _worthwhile(call: Call, factor: Factor, width: int, out: int) -> Factor:
    """One weight where factors have fewer MACs than it only while the layer makes all of its channels."""
    kernel, part = call.kernel, factor.model_copy(update={"keep": None})

    def saves(rows: int) -> bool:
        shape = rows, width, *kernel.size
        split, plain = (
            macs_after(shape, f, kernel.out_plane, kernel.plane) for f in (part, part.as_one_weight())
        )
        return split < plain

    if factor.rank is not None and out < call.out and saves(call.out) and not saves(out):
        return part.as_one_weight()
    return part


def factored(kernel: Kernel, into: int, out: int, factor: Factor) -> list[Operator]:
    """The operators that take the place of one, with their channels in and out.

    Args:
        kernel, into, out: a convolution without groups or a linear layer, and what it reads and makes.
        factor: its ranks count, `keep` does not.
    """
    if factor.rank is None:
        return [(kernel, into, out)]
    rank, *rest = ranks((out, into, *kernel.size), factor)
    if kernel.op == "linear":
        return [(kernel, into, rank), (kernel, rank, out)]
    point = _pointwise(kernel.out_plane)
    if factor.kind == "tucker2":
        (rank_in,) = rest
        return [(_pointwise(kernel.plane), into, rank_in), (kernel, rank_in, rank), (point, rank, out)]
    if factor.kind == "spatial":
        column, row = _split(kernel)
        return [(column, into, rank), (row, rank, out)]
    return [(kernel, into, rank), (point, rank, out)]


def _pointwise(plane: tuple[int, ...]) -> Kernel:
    ones = (1,) * len(plane)
    return Kernel("conv", plane, ones, ones, ones, (0,) * (2 * len(plane)))


def _split(kernel: Kernel) -> tuple[Kernel, Kernel]:
    """kh x 1, then 1 x kw on what that yields."""
    (height, width), (down, right), (tall, wide) = kernel.size, kernel.stride, kernel.dilation
    top, left, bottom, behind = kernel.pads
    column = Kernel("conv", kernel.plane, (height, 1), (down, 1), (tall, 1), (top, 0, bottom, 0))
    return column, Kernel("conv", column.out_plane, (1, width), (1, right), (1, wide), (0, left, 0, behind))


class LayerClock:
    """Predicted times of single layers and of their factors, all else as it is.

    Args:
        program: before.
        model: predicts its operators.
        widest: the factors of the highest ranks that are going to be asked about.
    """

    def __init__(self, program: Program, model: LatencyModel, widest: Iterable[Factor]) -> None:
        self.model = model
        self.whole = model.predict(program)
        self._calls: dict[str, list[Operator]] = defaultdict(list)
        for call in calls(program):
            if call.node.op == "call_module":
                self._calls[str(call.node.target)].append(call.operator)
        model.prepare(operator for factor in widest for operator in self._operators(factor))

    def milliseconds(self, factor: Factor) -> float:
        """Of all calls of a layer after a factor."""
        return sum(self.model.milliseconds(*operator) for operator in self._operators(factor))

    def saving(self, factor: Factor) -> float:
        """Milliseconds that a factor saves; negative if it costs more."""
        return self.milliseconds(factor.as_one_weight()) - self.milliseconds(factor)

    def _operators(self, factor: Factor) -> list[Operator]:
        return [new for old in self._calls.get(factor.layer, ()) for new in factored(*old, factor)]
