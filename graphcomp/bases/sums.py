"""What of a sum is one operand's own: where operands of an addition lose channels by themselves (`join=pad`).

A reader of x = a + b that loses a still reads b, and what b says of x is left. So of the error of losing x
there is, channel by channel, over samples and positions,

    share = 1 - corr(x, b)^2
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from graphcomp.base import cache as disk
from graphcomp.base import distributed
from graphcomp.channels import Channels, Join
from graphcomp.data import Split
from graphcomp.ir import editable, evaluating, moved
from graphcomp.measure import calibrate

Shares = NDArray[np.float64]

KIND = "sums"
"""Of entries in the cache."""


def own_shares(channels: Channels, split: Split) -> dict[Join, tuple[Shares, Shares]]:
    """Of every padded sum, what is the first operand's own and the second's, by channel `[n]`; collective."""
    if not channels.joins:
        return {}
    program = channels.program
    names = [join.node.name for join in channels.joins]
    content = {"program": program.fingerprint(), "data": split.fingerprint()}
    key = disk.key(__name__, **content, sums=names, axes=[join.axis for join in channels.joins])
    found = distributed.on_first(lambda: disk.load(KIND, key))
    if found is None:
        found = _measure(channels, split)
        if distributed.is_first():
            disk.store(KIND, key, found)
    return {join: _shares(found[join.node.name]) for join in channels.joins}


def _shares(moments: Tensor) -> tuple[Shares, Shares]:
    """From means of 1, a, b, a^2, b^2 and a b, `[6, n]`."""
    _, a, b, aa, bb, ab = moments
    va, vb, cov = (aa - a * a).clamp(min=0), (bb - b * b).clamp(min=0), ab - a * b
    whole = (va + vb + 2 * cov).clamp(min=0)

    def own(other: Tensor) -> Shares:
        explained = (other + cov).square() / (whole * other)
        shares: Shares = (1 - explained.nan_to_num(0, 0, 0).clamp(0, 1)).numpy()
        return shares

    return own(vb), own(va)


@torch.no_grad()
def _measure(channels: Channels, split: Split) -> dict[str, Tensor]:
    device = distributed.device()
    module = editable(channels.program).to(device)
    batch = calibrate.batch_size(channels.program)
    mine = distributed.share(len(split), batch)
    run = _Adding(module, channels.joins)
    with evaluating(module):
        for x, _ in split.subset(mine).batches(batch):
            run.run(*moved(x, device))
    for join in channels.joins:  # a process without samples has seen none
        run.sums.setdefault(
            join.node.name, torch.zeros(6, len(join.result), dtype=torch.float64, device=device)
        )
    distributed.all_reduce([run.sums[join.node.name] for join in channels.joins])
    return {name: (total / total[0]).cpu() for name, total in run.sums.items()}


class _Adding(fx.Interpreter):
    """Adds up what padded sums are given."""

    def __init__(self, module: fx.GraphModule, joins: Sequence[Join]) -> None:
        super().__init__(module)
        self.axes = {join.node.name: join.axis for join in joins}
        self.sums: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.axes:
            operands = self.fetch_args_kwargs_from_env(n)[0][:2]
            shape = torch.broadcast_shapes(*(x.shape for x in operands))  # type: ignore[no-untyped-call]
            a, b = (x.expand(shape).movedim(self.axes[n.name], 0).flatten(1).double() for x in operands)
            found = torch.stack([(x * y).sum(1) for x, y in _pairs(a, b)])
            self.sums[n.name] = self.sums.get(n.name, torch.zeros_like(found)) + found
        return super().run_node(n)


def _pairs(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    one = torch.ones_like(a)
    return [(one, one), (a, one), (b, one), (a, a), (b, b), (a, b)]
