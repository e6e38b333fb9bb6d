"""Parameters and multiply-accumulates after a removal, as a function of it: nothing is built."""

from collections.abc import Callable
from math import prod
from typing import Literal

from torch import Tensor, fx

from graphcomp.channels import Channels, Ints, Removal, varying
from graphcomp.measure import params_trainable, products

Counter = Literal["macs", "params"]
Cost = Callable[[Removal], float]
"""What a program costs after a removal."""


class CostModel:
    """Parameters and MACs of a program after a removal, from the axes alone."""

    def __init__(self, channels: Channels) -> None:
        program, self.axes = channels.program, channels.axes
        self.total_params = params_trainable(program)
        self.sizes: dict[str, tuple[int, bool]] = {}
        name_of: dict[int, str] = {}  # a tied weight is on the axes under one of its names
        for axis in self.axes:
            for name, _ in axis.tensors:
                tensor = program.tensors[name]
                self.sizes[name] = tensor.numel(), tensor.requires_grad
                name_of[id(tensor)] = name
        self.layers: list[tuple[int, str, int]] = []  # node by number, its weight, its MACs
        self.positions: dict[int, list[Ints]] = {}  # node by number, channels along axes that it runs over
        for number, node in enumerate(program.graph.nodes):
            for weight, count in products(program, node):
                self.layers.append((number, name_of.get(id(weight), ""), count))
                self.positions[number] = _positions(channels, node, weight)

    def macs(self, removal: Removal) -> float:
        """Multiply-accumulates after the removal."""
        left, idle = self._left(removal), removal.idle.nodes
        return sum(
            m * left.get(weight, 1.0) * prod(_share(removal, ids) for ids in self.positions[number])
            for number, weight, m in self.layers
            if not idle[number]
        )

    def params(self, removal: Removal) -> float:
        """Trainable parameters after the removal."""
        left = self._left(removal)
        return self.total_params - sum(
            n * (1 - left[name]) for name, (n, trainable) in self.sizes.items() if trainable
        )

    def _left(self, removal: Removal) -> dict[str, float]:
        """The fraction of every tensor that stays."""
        left = dict.fromkeys(self.sizes, 1.0)
        for axis in self.axes:
            fraction = _share(removal, axis.channels)
            for name, _ in axis.tensors:
                left[name] *= fraction
        return {**left, **{name: 0.0 for name in removal.idle.tensors if name in left}}


def _share(removal: Removal, ids: Ints) -> float:
    return 1 - float(removal.gone[ids].mean())


def _positions(channels: Channels, node: fx.Node, weight: Tensor | None) -> list[Ints]:
    """The channels along axes that a layer runs over, as the layers of tokens of a mixer do.

    Of a weight that is computed, those that it has.
    """
    if weight is None:
        made = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        labels = channels.values.get(made) if isinstance(made, fx.Node) else None
        over = varying(labels) if isinstance(labels, Tensor) else ()
    else:
        labels = channels.values.get(node)
        if not isinstance(labels, Tensor):
            return []
        own = labels.ndim - 1 if weight.ndim == 2 else 1
        over = tuple(d for d in varying(labels) if d not in (0, own))
    if not isinstance(labels, Tensor):
        return []
    return [channels.channel_of[labels.movedim(d, 0).reshape(labels.size(d), -1)[:, 0].numpy()] for d in over]


def cost_of(counter: Counter, channels: Channels) -> Cost:
    """What a target counts, as a function of the removal."""
    model = CostModel(channels)
    return {"macs": model.macs, "params": model.params}[counter]
