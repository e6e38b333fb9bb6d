"""What a line of layers computes of some samples, and how far that is from what is asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.measure import outputs_at
from graphcomp.passes.refit.lines import Line


@dataclass(frozen=True, eq=False)
class Sample:
    """Some samples at the beginning of a line, and what is asked for at its end.

    Attributes:
        x: what the first layer reads.
        at, target, other, is_held_out: see `Rows`; of the last layer.
        is_scout: whether curvature is measured on these, too, and not the gradient alone.
        first, count: number of the first sample, and how many.
    """

    x: Tensor
    at: Tensor
    target: Tensor
    other: Tensor | None
    is_held_out: bool
    is_scout: bool
    first: int
    count: int

    def pieces(self, size: int) -> Iterator["Sample"]:
        """So many samples at a time."""
        per, maps = len(self.at) // self.count, len(self.x)
        if per * self.count != len(self.at) or maps % self.count:
            yield self
            return
        rows = self.at.shape[1] * per
        for i in range(0, self.count, size):
            n = min(size, self.count - i)
            a, b = i * rows, (i + n) * rows
            yield Sample(
                self.x[i * maps // self.count : (i + n) * maps // self.count],
                self.at[i * per : (i + n) * per],
                self.target[a:b],
                None if self.other is None else self.other[a:b],
                self.is_held_out,
                self.is_scout,
                self.first + i,
                n,
            )


class LineRun(fx.Interpreter):
    """Runs a line; where gradients are asked for, keeps what its layers read and yield, by layer.

    Args:
        module, line: see there.
        weights: of errors by channel of the last layer; None: all alike.
    """

    def __init__(self, module: fx.GraphModule, line: Line, weights: Tensor | None = None) -> None:
        super().__init__(module)
        self.weights = weights
        names = {node.name: node for node in module.graph.nodes}
        self.line, self.entry = line, names[line.entry.name]
        self.nodes = [names[node.name] for node in line.nodes]
        self.read: dict[str, Tensor] = {}
        self.yielded: dict[str, Tensor] = {}

    def over(self, x: Tensor, until: str | None = None) -> Tensor:
        """What the last node yields, or the one before the node of this name."""
        self.env = {self.entry: x}
        value = x
        for node in self.nodes:
            if node.name == until:
                break
            value = self.env[node] = self.run_node(node)
        return value

    def error(self, sample: Sample) -> Tensor:
        """z - D behind the activation, weighted, `[rows, channels]`."""
        unit = self.line.unit
        layer = cast(nn.Module, self.fetch_attr(unit.layer))
        z = outputs_at(layer, self.over(sample.x), sample.at)
        z = z if sample.other is None else z + sample.other
        d, now = sample.target.to(z.dtype), z.detach()
        d = torch.where(d < unit.low, now.clamp(max=unit.low), d)
        d = torch.where(d > unit.high, now.clamp(min=unit.high), d)
        return z - d if self.weights is None else (z - d) * self.weights.to(z)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is changed in place behind a layer is not what it yields."""
        value = super().call_module(target, args, kwargs)
        if torch.is_grad_enabled() and target in self.line.layers:
            self.read[target], self.yielded[target] = args[0].detach(), value
            return value.clone()
        return value
