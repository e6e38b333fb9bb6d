"""What tests of channel removal share: a random choice of half the channels, and removal as a pass."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import nn

from graphcomp.channels import Channels, Granularity, JoinPolicy, Removal, analyse
from graphcomp.channels.labels import Ints
from graphcomp.ir.program import Program, named_tensors
from graphcomp.ir.tracing import trace
from tests.nets import Built, scramble

JOINS: tuple[JoinPolicy, ...] = get_args(JoinPolicy)
Rows = Mapping[str, Sequence[int]]


def exact_program(built: Built, seed: int = 0) -> Program:
    """The network, scrambled, in float64."""
    module, shape = built
    return trace(scramble(module, seed).double(), torch.zeros(shape, dtype=torch.float64), copy_weights=False)


def plain_program(module: nn.Module, *shape: int, fold: bool = True) -> Program:
    """The network as it was built."""
    dtype = next((p.dtype for p in module.parameters()), None)
    return trace(module, torch.zeros(shape, dtype=dtype), copy_weights=False, fold=fold)


def random_scores(channels: Channels, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """A number for every channel."""
    return np.random.default_rng(seed).random(len(channels.channel_of))


def half(channels: Channels, seed: int = 0) -> Removal:
    """The lower half by `random_scores` of every block of every removable group."""
    score, gone = random_scores(channels, seed), channels.marks()
    for group in channels.removable:
        for block in np.unique(group.blocks):
            members = group.channels[group.blocks == block]
            gone[members[np.argsort(score[members])[: len(members) // 2]]] = True
    return Removal(channels, gone)


def half_and_whole(channels: Channels, seed: int = 0) -> Removal:
    """Also all of every third removable group."""
    gone = half(channels, seed).gone
    for group in np.random.default_rng(seed).permutation(np.arange(len(channels.removable)))[::3].tolist():
        gone[channels.removable[group].channels] = True
    return Removal(channels, gone)


def some(channels: Channels, seed: int = 0) -> Removal:
    """A random number of random channels, often one, of about half of the removable groups."""
    random, gone = np.random.default_rng(seed), channels.marks()
    for group in channels.removable:
        if random.random() < 0.5:
            count = 1 if random.random() < 0.5 else random.integers(1, len(group.channels) + 1)
            gone[random.choice(group.channels, count, replace=False)] = True
    return Removal(channels, gone)


def every_other(channels: Channels, layer: str) -> Removal:
    """Channels 0, 2, 4, … of what a layer produces."""
    return Removal.of(channels, (c for g in channels.group_of(layer) for c in g.channels[::2].tolist()))


def rows_of(channels: Channels, layer: str) -> Ints:
    """The channel of every output row of a layer."""
    return next(a.channels for a in channels.axes if a.role == "out" and a.weight.startswith(f"{layer}."))


@dataclass(frozen=True)
class ByRows:
    """Channel removal as a pass whose plan is its rows."""

    join: JoinPolicy = "couple"
    granularity: Granularity = "channel"
    name: str = "removal"

    def simulate(self, program: Program, plan: Rows) -> Program:
        channels = analyse(program, self.join, self.granularity)
        return Removal.from_rows(channels, plan).mask()

    def rewrite(self, program: Program, plan: Rows) -> Program:
        channels = analyse(program, self.join, self.granularity)
        return Removal.from_rows(channels, plan).apply(self.name)


def digest(program: Program) -> str:
    """A hash of the printed graph and of every tensor's name, bytes and `requires_grad`."""
    found = hashlib.sha256(str(program).encode())
    for name, tensor in named_tensors(program.module).items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()
