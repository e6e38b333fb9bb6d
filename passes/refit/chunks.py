"""Samples on their way through the small network, some at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx

from graphcomp.base import distributed
from graphcomp.bases import copied_values
from graphcomp.data import Split
from graphcomp.ir import Program
from graphcomp.measure import calibrate

HELD_OUT = 8
"""One of so many chunks of samples is held out from the choice of the ridge."""


class Chunk(fx.Interpreter):
    """Some samples, and what is alive of them where they are.

    Attributes:
        x, count, first: the samples, how many, and the number of the first one in its split.
        is_held_out: whether fits do not see them.
        targets: what calls of layers are to yield, by the call's node.
    """

    def __init__(self, module: fx.GraphModule, x: Tensor, first: int, is_held_out: bool) -> None:
        super().__init__(module)
        self.env: dict[fx.Node, Any] = {}
        self.args_iter = iter([x])
        self.x, self.count, self.first, self.is_held_out = x, len(x), first, is_held_out
        self.targets: dict[str, Tensor] = {}

    def step(self, node: fx.Node) -> None:
        """Run a node, and forget what nothing needs any more."""
        self.env[node] = self.run_node(node)
        for dead in self.user_to_last_uses.get(node, ()):
            del self.env[dead]

    def ahead(
        self, nodes: Sequence[fx.Node], wanted: Mapping[fx.Node, Sequence[fx.Node]]
    ) -> dict[fx.Node, dict[fx.Node, Tensor]]:
        """Run on through `nodes`, on copies: what some of them find, of the values that are asked for."""
        here, self.env = self.env, copied_values(self.env)
        found: dict[fx.Node, dict[fx.Node, Tensor]] = {}
        for node in nodes:
            if node in wanted:
                found[node] = {value: self.env[value].clone() for value in wanted[node]}
            if len(found) == len(wanted):
                break
            self.step(node)
        self.env = here
        return found

    def waiting(self) -> Iterator[Tensor]:
        """Activations that wait here."""
        yield from (v for n, v in self.env.items() if isinstance(v, Tensor) and n.op != "get_attr")


def draw(original: Program, split: Split, seed: int) -> Iterator[tuple[Tensor, int, bool]]:
    """This process's samples in random order: batches, the number of each one's first, whether held out."""
    size = max(1, min(calibrate.batch_size(original), math.ceil(len(split) / (2 * HELD_OUT))))
    shuffled = split.subset(np.random.default_rng(seed).permutation(len(split)))
    mine = distributed.share(len(split), size)
    for positions in np.split(mine, np.flatnonzero(np.diff(mine // size)) + 1):
        if len(positions):
            x, _ = next(shuffled.subset(positions).batches(len(positions)))
            number = int(positions[0])
            yield x, number, number // size % HELD_OUT == HELD_OUT - 1
