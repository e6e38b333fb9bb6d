"""What files have in several nodes and torch in one: orders of axes in a row, and biases behind layers."""

import math
import operator
from collections import Counter
from typing import cast

import torch
from torch import Tensor, fx, nn

from graphcomp.ir import eliminate_dead_nodes
from graphcomp.onnx.rows import VALUE_KEY


def tidy(root: nn.Module, graph: fx.Graph) -> None:
    """Join what belongs together, in place; the program computes the same."""
    compose_transposes(graph)
    merge_biases(root, graph)
    eliminate_dead_nodes(graph, root)


def compose_transposes(graph: fx.Graph) -> None:
    """One permutation for two in a row, none for two that undo each other."""
    for node in list(graph.nodes):
        if node.target is not torch.permute:
            continue
        source, order = cast(fx.Node, node.args[0]), cast(tuple[int, ...], node.args[1])
        if source.target is torch.permute:
            inner = cast(tuple[int, ...], source.args[1])
            source, order = cast(fx.Node, source.args[0]), tuple(inner[d] for d in order)
            node.args = (source, order)
        if list(order) == sorted(order):
            node.replace_all_uses_with(source)


_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def merge_biases(root: nn.Module, graph: fx.Graph) -> None:
    """A constant that is added to every channel of a layer without a bias becomes its bias."""
    calls = Counter(n.target for n in graph.nodes if n.op == "call_module")
    for node in list(graph.nodes):
        if node.target is not operator.add or len(node.all_input_nodes) != 2:
            continue
        first, second = cast(tuple[fx.Node, fx.Node], node.args)
        layer, constant = (first, second) if first.op == "call_module" else (second, first)
        if layer.op != "call_module" or constant.op != "get_attr" or len(layer.users) != 1:
            continue
        module = root.get_submodule(cast(str, layer.target))
        if not isinstance(module, _LAYERS) or module.bias is not None or calls[layer.target] != 1:
            continue
        bias = _as_bias(module, _tensor(root, cast(str, constant.target)))
        if bias is not None:
            module.bias = nn.Parameter(bias)
            layer.meta[VALUE_KEY] = node.meta[VALUE_KEY]
            node.replace_all_uses_with(layer)
            graph.erase_node(node)


def _as_bias(module: nn.Module, tensor: Tensor) -> Tensor | None:
    """A number a channel, if that is what the tensor has; a copy, for others may read it, too."""
    weight = cast(Tensor, module.weight)
    behind = 0 if isinstance(module, nn.Linear) else weight.ndim - 2
    channels = weight.shape[0] if isinstance(module, nn.Linear) else cast(nn.Conv2d, module).out_channels
    shape = tuple(tensor.shape)
    at = len(shape) - behind - 1
    if at < 0 or shape[at] != channels or math.prod(shape) != channels or len(shape) > 2 + behind:
        return None
    return tensor.detach().reshape(-1).clone()


def _tensor(root: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return cast(Tensor, getattr(root.get_submodule(owner), leaf))
