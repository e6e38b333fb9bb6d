"""What a layer may become along an order of removal: how wide, of which rank, at how many MACs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graphcomp.channels import round_within
from graphcomp.passes.cc.units import Unit, WeightShape


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
        width = round_within(channels, multiple, shape.channels)
        if directions < shape.directions:
            rank = round_within(directions, multiple, shape.directions)
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
        round_within(1, multiple, shape.channels),
        round_within(1, multiple, shape.directions),
    )
    return min(shape.macs(), shape.macs(width), shape.macs(width, rank))
