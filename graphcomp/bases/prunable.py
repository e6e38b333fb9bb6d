"""Prunable layers: those whose channels are theirs alone, and the ReLU behind them (METHODS 2.1).

A layer whose output is added to another layer's shares its channels with it and is not prunable: whatever one
loses the other must lose as well. What a prunable layer yields is read by no addition.
"""

from typing import cast

from torch import fx, nn

from graphcomp.channels import ChannelGroup, Channels
from graphcomp.ir import Program, op_name


def why_shared(group: ChannelGroup) -> str | None:
    """Why the channels of a group are not one layer's own; None if they are."""
    others = len(group.producers) - 1
    return f"its channels are shared with {others} other layer(s)" if others > 0 else None


def unprunable_layers(channels: Channels) -> set[str]:
    """Layers that share channels, all or some of them, with others."""
    return {layer for g in channels.removable if why_shared(g) for layer in g.producers}


def prunable_relus(channels: Channels) -> dict[str, fx.Node]:
    """Prunable layer -> the ReLU that it feeds, for those that feed one, in the order of the network."""
    shared = unprunable_layers(channels)
    own = [g.name for g in channels.removable if g.producers and g.name not in shared]
    found = {name: relu_after(channels.program, layer_node(channels.program, name)) for name in own}
    return {name: relu for name, relu in found.items() if relu is not None}


def layer_node(program: Program, layer: str) -> fx.Node | None:
    """The node of a layer's first call."""
    return next((n for n in program.graph.nodes if n.op == "call_module" and n.target == layer), None)


def channel_dim(program: Program, node: fx.Node | None) -> int:
    """Dimension of a layer's channels: the last of a linear layer, else the second."""
    assert node is not None  # a layer with a ReLU behind it
    return -1 if isinstance(program.layer(cast(str, node.target)), nn.Linear) else 1


def relu_after(program: Program, node: fx.Node | None) -> fx.Node | None:
    """The ReLU that a layer feeds, directly or through a normalisation, and nothing else."""
    while node is not None:
        users = list(node.users)
        if len(users) != 1:
            return None
        node = users[0]
        module = program.layer(cast(str, node.target)) if node.op == "call_module" else None
        if op_name(program, node) in ("relu", "relu6"):
            return node
        if not isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Identity | nn.Dropout):
            return None
    return None
