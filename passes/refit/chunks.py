"""Samples on their way through the small network, some at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor, fx

from graphcomp.base import distributed
from graphcomp.bases import copied_values
from graphcomp.data import Split
from graphcomp.ir import Batch, Program
from graphcomp.measure import calibrate

HELD_OUT = 8
"""One of so many chunks of samples is held out: by these a ridge is chosen and a step judged."""

SCOUTS = 4
"""On one of so many chunks curvature is measured (see `joint`)."""


class Chunk(fx.Interpreter):
    """Some samples, and what is alive of them where they are.

    Attributes:
        inputs, count, first: samples that have not begun, how many all are, and the number of the first one
            in its split.
        number: of the chunk, over all processes.
        targets: what calls of layers are to yield, by the call's node.
        held: values that are needed again, by what begins with them, with their versions: what is changed in
            place is of no use.
    """

    def __init__(self, module: fx.GraphModule, inputs: Batch, first: int, number: int) -> None:
        super().__init__(module)
        self.env: dict[fx.Node, Any] = {}
        self.inputs, self.count, self.first, self.number = inputs, len(inputs[0]), first, number
        self.args_iter = self._handed_out()
        self.targets: dict[str, Tensor] = {}
        self.held: dict[str, tuple[Tensor, int]] = {}

    @property
    def is_held_out(self) -> bool:
        """Whether fits do not see its samples."""
        return self.number % HELD_OUT == HELD_OUT - 1

    @property
    def is_scout(self) -> bool:
        """Whether its samples are among the few by which curvature is measured."""
        return self.number % SCOUTS == 0

    def _handed_out(self) -> Iterator[Tensor]:
        """The inputs, each of which is the network's from there on."""
        while self.inputs:
            x, *rest = self.inputs
            self.inputs = tuple(rest)
            yield x

    def step(self, node: fx.Node) -> None:
        """Run a node, and forget what nothing needs any more."""
        self.env[node] = self.run_node(node)
        for dead in self.user_to_last_uses.get(node, ()):
            del self.env[dead]

    def hold(self, node: fx.Node) -> None:
        """Keep what a node reads for later."""
        value = self.env[cast(fx.Node, node.args[0])]
        self.held[node.name] = value, value._version

    def held_back(self, node: fx.Node) -> Tensor | None:
        """What a node had read; None if it was changed in place since."""
        value, version = self.held[node.name]
        return value if value._version == version else None

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
        """Activations that wait here, and samples that have not begun."""
        yield from self.inputs
        yield from (v for n, v in self.env.items() if isinstance(v, Tensor) and n.op != "get_attr")
        yield from (value for value, _ in self.held.values())


def draw(original: Program, split: Split, seed: int) -> Iterator[tuple[Batch, int, int]]:
    """This process's samples in random order: batches, the number of each one's first, and its own."""
    size = max(1, min(calibrate.batch_size(original), math.ceil(len(split) / (2 * HELD_OUT))))
    shuffled = split.subset(np.random.default_rng(seed).permutation(len(split)))
    mine = distributed.share(len(split), size)
    for positions in np.split(mine, np.flatnonzero(np.diff(mine // size)) + 1):
        if len(positions):
            x, _ = next(shuffled.subset(positions).batches(len(positions)))
            first = int(positions[0])
            yield x, first, first // size
