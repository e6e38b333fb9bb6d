"""Orders of a weight's columns for `dct`: how they are found, kept on disk, and packed into a plan."""

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from graphcomp.base import Progress, cache, sha256
from graphcomp.errors import PassError
from graphcomp.ir import Program, narrowest
from graphcomp.passes.dct.layout import Layout
from graphcomp.passes.dct.ordering import OrderDistance, StartNorm, chain

CACHED = 4096
"""Chains of so many columns are kept on disk: they take a while, and do not depend on the rate."""


def by_norm(weight: Tensor, x: Layout) -> Tensor:
    """Columns from the largest Euclidean norm to the smallest; ties: the smallest column."""
    norms = weight.double().reshape(x.rows, x.columns).square().sum(0)
    return torch.argsort(norms, descending=True, stable=True)


def by_chain(weight: Tensor, x: Layout, distance: OrderDistance, start: StartNorm) -> Tensor:
    """Columns in the order of the greedy chain, int64 (columns,); see `passes.dct.ordering.chain`."""
    weight = weight.cpu().contiguous()
    key = cache.key(
        __name__,
        weight=sha256([weight.reshape(-1).view(torch.uint8).numpy().data]),
        rows=x.rows,
        distance=distance,
        start=start,
    )
    known = cache.load("order", key) if x.columns >= CACHED else None
    if known is not None:
        return known["order"].long()
    try:
        order = torch.from_numpy(chain(weight.double().reshape(x.rows, x.columns).numpy(), distance, start))
    except PassError as error:
        raise PassError(f"{x.layer}: {error}") from error
    if x.columns >= CACHED:
        cache.store("order", key, {"order": order.to(narrowest(x.columns))})
    return order


def orders_of(
    program: Program, chosen: Sequence[Layout], order: Callable[[Tensor, Layout], Tensor], progress: Progress
) -> dict[str, Tensor]:
    """The order of every layer's columns, by layer."""
    orders: dict[str, Tensor] = {}
    done, total = 0, sum(x.columns for x in chosen)
    for x in chosen:
        progress(f"order the columns of {x.layer}", done / total)
        orders[x.layer] = order(program.tensors[f"{x.layer}.weight"].detach(), x)
        done += x.columns
    return orders


def packed(order: Tensor) -> str:
    """An order as text: the narrowest integers, little-endian, zlib, base64."""
    values = order.cpu().to(narrowest(len(order))).numpy()
    return base64.b64encode(zlib.compress(values.astype(values.dtype.newbyteorder("<")).tobytes())).decode()


def unpacked(bulk: Mapping[str, str], x: Layout) -> Tensor:
    """The order of a layer, int64 (columns,); PassError if there is none or it is no permutation."""
    dtype = torch.empty(0, dtype=narrowest(x.columns)).numpy().dtype.newbyteorder("<")
    try:
        order = np.frombuffer(zlib.decompress(base64.b64decode(bulk[x.layer])), dtype).astype(np.int64)
    except (KeyError, ValueError, zlib.error) as error:
        found = "no order" if isinstance(error, KeyError) else f"a damaged order ({error})"
        raise PassError(
            f"{x.layer}: found {found}, expected one under bulk; use the plan as it was saved, not that of "
            "a program's history"
        ) from error
    if not np.array_equal(np.sort(order), np.arange(x.columns)):
        raise PassError(
            f"{x.layer}: found an order of {len(order)} columns, expected each of {x.columns} once; "
            "use a plan that was made for this program"
        )
    return torch.from_numpy(order)
