"""Indices and slices of tensors and tuples, read and written."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.ir import PASS_KEY


def insert_select(
    root: nn.Module,
    graph: fx.Graph,
    source: fx.Node,
    axis: int,
    positions: Tensor,
    name: str,
    pass_name: str,
) -> fx.Node:
    """Add index_select(source, axis, positions) at the graph's insertion point.

    Args:
        root: holds the graph's tensors; it gets the positions as a buffer `graphcomp_index_NAME`.
        graph: edited in place.
        source, axis, positions: what to pick from, int64 positions of any length.
        name: for the buffer; made unique.
        pass_name: recorded on both nodes.
    """
    buffer = _free_name(root, f"graphcomp_index_{name}")
    root.register_buffer(buffer, positions.clone())
    index = graph.create_node("get_attr", buffer)
    picked = graph.call_function(torch.index_select, (source, axis, index))
    for node in (index, picked):
        node.meta = {PASS_KEY: pass_name}
    return picked


def _free_name(module: nn.Module, name: str) -> str:
    while hasattr(module, name):
        name += "_"
    return name


def picked(pieces: Sequence[int], index: Any) -> list[int]:
    """The pieces that an index or slice picks; none if it is not there, or not known."""
    try:
        found = pieces[index]
    except (IndexError, TypeError):
        return []
    return list(found) if isinstance(index, slice) else [cast(int, found)]


def slice_of(positions: Sequence[int]) -> slice | None:
    """The slice that yields these positions, if there is one."""
    first, step = (positions[0] if positions else 0), 1
    if len(positions) > 1:
        step = positions[1] - first
    end = first + step * len(positions)
    found = slice(first, end if end >= 0 else None, step)
    return found if list(range(max(positions, default=0) + 1))[found] == list(positions) else None


def full_index(index: Any, ndim: int) -> list[Any]:
    """An item's index with the ellipsis written out."""
    items = list(index) if isinstance(index, tuple | list) else [index]
    used = sum(i is not None and i is not Ellipsis for i in items)
    if Ellipsis in [i for i in items if not isinstance(i, fx.Node | Tensor)]:
        at = next(k for k, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (ndim - used)
    else:
        items += [slice(None)] * (ndim - used)
    return items


def entry_of(items: Sequence[Any], axis: int) -> int | None:
    """Which entry of a full index speaks of input axis `axis`."""
    real = [k for k, i in enumerate(items) if i is not None]
    return real[axis] if axis < len(real) else None
