"""Where the responses of a group's channels are seen: layers, or the additions in which they meet."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Literal

import numpy as np
from torch import Tensor, fx, nn

from graphcomp.bases import JoinOption
from graphcomp.channels import ChannelGroup, Channels, Ints, compact, varying
from graphcomp.ir import Program, op_name
from graphcomp.measure import Request, layer_row, layer_weight

Response = Literal["conv", "bn"]

Calls = Mapping[int, Sequence[fx.Node]]
"""id of a weight -> the nodes that it is the weight of."""


@plain_dataclass(frozen=True, eq=False)
class View:
    """Where responses of a group's channels are seen: a layer, or an addition.

    Attributes:
        requests: one for every call of the layer.
        channels: the channel at every position of the responses.
    """

    requests: tuple[Request, ...]
    channels: Ints


def calls_of(program: Program) -> Calls:
    """Of every layer of a program."""
    calls: dict[int, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if layer_row(program, node) is not None:
            calls.setdefault(id(layer_weight(program, node)), []).append(node)
    return calls


def views_of(
    channels: Channels, group: ChannelGroup, calls: Calls, join: JoinOption, response: Response
) -> list[View]:
    """The additions (project) or the layers in which a group's responses are seen."""
    additions = list(_additions(channels, group)) if join == "project" else []
    return additions or list(_layers(channels, group, calls, response))


def _layers(channels: Channels, group: ChannelGroup, calls: Calls, response: Response) -> Iterator[View]:
    program = channels.program
    for axis in channels.axes:
        if axis.role == "out" and group.channels[0] in axis.channels:
            weight = program.tensors[axis.weight]
            spatial = max(weight.ndim - 2, 0)
            nodes = [
                normalisation_behind(program, node) or node if response == "bn" else node
                for node in calls.get(id(weight), ())
            ]
            dims = [len(program.shape(node) or ()) - spatial - 1 for node in nodes]
            requests = [Request(n.name, "covariance", dim) for n, dim in zip(nodes, dims, strict=True)]
            if requests:
                yield View(tuple(requests), axis.channels)


def normalisation_behind(program: Program, node: fx.Node) -> fx.Node | None:
    """The batch normalisation that a layer feeds, and nothing else."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or user is None or user.op != "call_module":
        return None
    return user if isinstance(program.layer(str(user.target)), nn.modules.batchnorm._BatchNorm) else None


def _additions(channels: Channels, group: ChannelGroup) -> Iterator[View]:
    """The additions of activations that all of the group's channels take part in."""
    for node in channels.program.graph.nodes:
        if op_name(channels.program, node) != "add":
            continue
        operands = [
            a for a in node.all_input_nodes if isinstance(channels.values[a], Tensor) and a.op != "get_attr"
        ]
        if len(operands) < 2 or len(axes := varying(channels.values[node])) != 1:
            continue
        positions = channels.channel_of[compact(channels.values[node]).flatten().numpy()]
        if np.isin(group.channels, positions).all():
            yield View((Request(node.name, "covariance", axes[0]),), positions)
