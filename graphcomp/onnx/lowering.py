"""DCT layers out of the exporter's way: it sees ordinary layers that hold their weight, or are given it.

Either is the same network under the same names. Given weights (further inputs of the network) can be computed
by nodes that are written afterwards (`onnx.weights`), and the exporter can neither follow how they are
computed in torch nor fold them.
"""

from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphcomp.ir import DctConv2d, DctLayer, Program, assemble, copy_graph, decode, parts

__all__ = ["dct_layers", "densified", "taking_weights", "weight_name"]


def dct_layers(program: Program) -> dict[str, DctLayer]:
    """The layers that a program's graph calls and whose weights are computed, by module path."""
    return {t: m for t, m in program.called_modules().items() if isinstance(m, DctLayer)}


def weight_name(target: str) -> str:
    """What the weight of the layer at module path `target` is called in a file, however it is stored."""
    return f"{target}.weight"


def densified(program: Program) -> Program:
    """The same network with plain layers that hold the weights which its DCT layers compute."""
    root, graph = parts(program)
    made: dict[DctLayer, nn.Module] = {}
    for target, layer in dct_layers(program).items():
        made[layer] = made.get(layer) or _plain(layer, nn.Conv2d, nn.Linear, _exact_weight(layer))
        root.set_submodule(target, made[layer])
    return replace(program, module=assemble(program, root, graph))


def _exact_weight(layer: DctLayer) -> nn.Parameter:
    """The layer's weight, in float64 until the end like that of the coefficient file: the same numbers."""
    exact = decode(layer.coefficients.detach().double(), layer.columns, layer.index, layer.basis)
    return nn.Parameter(exact.reshape(layer.weight_shape).to(layer.coefficients.dtype))


class _Conv2d(nn.Conv2d):
    """A convolution that is given its weight."""

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        result: Tensor = self._conv_forward(input, weight, self.bias)
        return result


class _Linear(nn.Linear):
    """A linear layer that is given its weight."""

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(input, weight, self.bias)


def taking_weights(program: Program) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The network with the weights of its DCT layers as further inputs, so that no exporter computes them.

    Returns:
        The network, whose nodes have the program's names, and the further inputs in order: name in the file
        to an empty tensor of the weight's shape.
    """
    layers, graph = dct_layers(program), copy_graph(program.graph)
    roots: dict[str, Any] = {**program.modules, **program.tensors}
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    given: dict[DctLayer, fx.Node] = {}
    weights: dict[str, Tensor] = {}
    for target, layer in layers.items():
        roots[target] = _plain(layer, _Conv2d, _Linear, None)
        if layer not in given:
            with graph.inserting_after(last):
                last = given[layer] = graph.placeholder(f"weight_{len(given)}")
            weights[weight_name(target)] = torch.empty(layer.weight_shape, dtype=layer.coefficients.dtype)
    for node in graph.nodes:
        if node.op == "call_module" and node.target in layers:
            node.args = (*node.args, given[layers[node.target]])
    used = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    return fx.GraphModule({t: roots[t] for t in used}, graph), weights


def _plain(
    layer: DctLayer, conv: type[nn.Conv2d], linear: type[nn.Linear], weight: nn.Parameter | None
) -> nn.Module:
    """The `conv` or `linear` that does what the layer does, with its bias and the given weight."""
    with torch.device("meta"):
        if isinstance(layer, DctConv2d):
            new: nn.Conv2d | nn.Linear = conv(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
                bias=False,
                padding_mode=cast(Literal["zeros", "reflect", "replicate", "circular"], layer.padding_mode),
            )
        else:
            new = linear(layer.weight_shape[1], layer.weight_shape[0], bias=False)
    new._parameters |= {"weight": weight, "bias": layer.bias}
    return new.eval()
