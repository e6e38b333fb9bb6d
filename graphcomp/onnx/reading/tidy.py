"""What files have in several nodes and torch in one: orders of axes in a row, biases behind layers, a
normalisation of groups as one of instances, and operands that are expanded to what they are added to.
"""

import math
import operator
from collections import Counter
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, fx, nn

from graphcomp.ir import eliminate_dead_nodes
from graphcomp.onnx.rows import VALUE_KEY, Made, Reading

Shapes = Mapping[fx.Node, Made]


def tidy(reading: Reading) -> None:
    """Join what belongs together, in place; the program computes the same."""
    root, graph = reading.root, reading.graph
    compose_transposes(graph)
    gather_group_norms(root, graph, reading.made)
    leave_expansions(graph, reading.made)
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


_BROADCAST = frozenset(
    {operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, torch.maximum, torch.minimum}
)


def leave_expansions(graph: fx.Graph, made: Shapes) -> None:
    """What is expanded to the shape of the other operand is broadcast to it without.

    Exporters write `x / norm.expand_as(x)`. An expansion ties channels to what it is made of.
    """
    for node in list(graph.nodes):
        if node.op != "call_method" or node.target != "expand":
            continue
        for user in list(node.users):
            others = [n for n in user.all_input_nodes if n is not node]
            if user.target in _BROADCAST and others and _shapes(made, others[0]) == made[node].shapes:
                user.replace_input_with(node, cast(fx.Node, node.args[0]))


def _shapes(made: Shapes, node: fx.Node) -> tuple[tuple[int, ...], ...] | None:
    """In every case; None of what is no tensor, or held by the program."""
    found = made.get(node)
    return found.shapes if found is not None and isinstance(found.values[0], Tensor) else None


_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def gather_group_norms(root: nn.Module, graph: fx.Graph, made: Shapes) -> None:
    """A normalisation of instances of groups that were given for channels is one of groups.

    Exporters write it so before operator set 21: reshaped to (samples, groups, rest), normalised, reshaped
    back, and then a scale and a shift a channel.
    """
    calls = Counter(n.target for n in graph.nodes if n.op == "call_module")
    for node in list(graph.nodes):
        norm = root.get_submodule(cast(str, node.target)) if node.op == "call_module" else None
        if not isinstance(norm, _INSTANCE_NORMS) or calls[node.target] != 1:
            continue
        before, behind = cast(fx.Node, node.args[0]), next(iter(node.users), None)
        if before.target not in (torch.reshape, torch.flatten) or behind is None or len(node.users) > 1:
            continue
        source = cast(fx.Node, before.args[0])
        if behind.target is not torch.reshape or not _is_by_group(made, source, node, behind):
            continue
        channels = made[source].shape[1]
        each = channels // norm.num_features
        layer = nn.GroupNorm(norm.num_features, channels, norm.eps).eval()
        scale, shift = (p.detach().repeat_interleave(each) for p in (norm.weight, norm.bias))
        last = behind
        for operation in (operator.mul, operator.add):
            found = _vector_behind(root, last, operation, made[source].shape)
            if found is None:
                continue
            last, vector = found
            scale, shift = (
                (scale * vector, shift * vector) if operation is operator.mul else (scale, shift + vector)
            )
        layer.weight, layer.bias = nn.Parameter(scale), nn.Parameter(shift)
        root.set_submodule(cast(str, node.target), layer)
        node.args = (source,)
        node.meta[VALUE_KEY] = last.meta[VALUE_KEY]
        last.replace_all_uses_with(node)


def _is_by_group(made: Shapes, source: fx.Node, grouped: fx.Node, behind: fx.Node) -> bool:
    """Whether a reshape made groups of neighbouring channels, and another undid it, for any sample."""
    shapes, inside = _shapes(made, source), made[grouped].shapes
    if shapes is None or shapes != made[behind].shapes or len(shapes[0]) < 3:
        return False
    same = all(a[0] == b[0] for a, b in zip(shapes, inside, strict=True))
    return same and shapes[0][1] % inside[0][1] == 0


def _vector_behind(
    root: nn.Module, node: fx.Node, operation: object, shape: tuple[int, ...]
) -> tuple[fx.Node, Tensor] | None:
    """The only reader of a node of this shape, if it takes a number a channel to it; and these."""
    reader = next(iter(node.users), None)
    if reader is None or len(node.users) > 1 or reader.target is not operation:
        return None
    others = [n for n in reader.all_input_nodes if n is not node]
    if len(others) != 1 or others[0].op != "get_attr":
        return None
    tensor = _tensor(root, cast(str, others[0].target))
    own = (1,) * (len(shape) - tensor.ndim) + tuple(tensor.shape)
    if own != (1, shape[1], *(1,) * (len(shape) - 2)):
        return None
    return reader, tensor.detach().reshape(-1)


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
