"""Parameters and multiply-accumulates after a removal, as a function of it: nothing is built."""

from collections.abc import Callable
from typing import Literal

from graphcomp.channels import Channels, Removal
from graphcomp.measure import layer_row, layer_weight, params_trainable

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
        for number, node in enumerate(program.graph.nodes):
            row = layer_row(program, node)
            if row is not None:
                self.layers.append((number, name_of.get(id(layer_weight(program, node)), ""), row.macs))

    def macs(self, removal: Removal) -> float:
        """Multiply-accumulates after the removal."""
        left, idle = self._left(removal), removal.idle.nodes
        return sum(m * left.get(weight, 1.0) for number, weight, m in self.layers if not idle[number])

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
            fraction = 1 - float(removal.gone[axis.channels].mean())
            for name, _ in axis.tensors:
                left[name] *= fraction
        return {**left, **{name: 0.0 for name in removal.idle.tensors if name in left}}


def cost_of(counter: Counter, channels: Channels) -> Cost:
    """What a target counts, as a function of the removal."""
    model = CostModel(channels)
    return {"macs": model.macs, "params": model.params}[counter]
