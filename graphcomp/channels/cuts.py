"""How a tensor shrinks: positions of one axis are deleted, or all of it goes, or it is no tensor any more."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from graphcomp.channels.labels import compact
from graphcomp.errors import SurgeryError


class Ragged:
    """A tensor from which the channels cannot be deleted as hyperplanes; its users must be bypassed."""


class Gone:
    """A tensor of which nothing is left: nobody reads it, and among others it is left out."""


RAGGED, GONE = Ragged(), Gone()


Cut = tuple[int, Tensor] | Ragged | Gone | None
"""How a tensor shrinks: (axis, positions to keep), not at all (None), to nothing, or not as a tensor.

A node that yields several tensors (a split) has a list of cuts. Like positions of a tensor, pieces that are
gone are deleted, and the others stay in their order.
"""


def pick(tensor: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Those positions of an axis; their shape on the meta device."""
    if tensor.is_meta:
        return tensor.narrow(axis, 0, positions.numel())
    return tensor.index_select(axis, positions)


def apply_cut(tensor: Tensor, cut: Cut) -> Tensor:
    """The tensor with positions deleted, still broadcast where it was."""
    if cut is None:
        return tensor
    if not isinstance(cut, tuple):
        raise SurgeryError("a tensor that is ragged or gone has no shape")
    axis, keep = cut
    if tensor.is_meta:
        return pick(tensor, axis, keep)
    shape = [*tensor.shape[:axis], keep.numel(), *tensor.shape[axis + 1 :]]
    if tensor.size(axis) > 1 and tensor.stride(axis) == 0:
        return tensor.narrow(axis, 0, 1).expand(shape)
    return compact(tensor, keep=(axis,)).index_select(axis, keep).expand(shape)


def apply_cuts(value: Any, cut: Any) -> Any:
    """`apply_cut` for a tensor or a tuple of tensors, of which those that are gone are left out."""
    if isinstance(cut, list):
        return tuple(apply_cut(v, c) for v, c in zip(value, cut, strict=True) if c is not GONE)
    return apply_cut(value, cut)


def has_ragged(cut: Any) -> bool:
    """Whether a cut, or one of several, leaves no tensor."""
    return cut is RAGGED or isinstance(cut, list) and any(c is RAGGED for c in cut)


def shrunk(shape: Sequence[int], cut: Cut) -> tuple[int, ...]:
    """The shape after a cut."""
    if not isinstance(cut, tuple):
        return tuple(shape)
    return (*shape[: cut[0]], cut[1].numel(), *shape[cut[0] + 1 :])


def shapes_of(value: Any, cut: Any = None) -> Any:
    """The shape of a tensor, or those of several, after a cut."""
    if isinstance(cut, list):
        return tuple(shapes_of(v, c) for v, c in zip(value, cut, strict=True) if c is not GONE)
    if isinstance(value, tuple | list):
        return tuple(map(shapes_of, value))
    return shrunk(value.shape, cut) if isinstance(value, Tensor) else None


def equal(a: Any, b: Tensor) -> bool:
    """Whether both are the same labels, however they are broadcast."""
    return isinstance(a, Tensor) and a.shape == b.shape and bool((compact(a) == compact(b)).all())
