"""How often channels are zero behind their ReLU, and from how often on they go."""

from typing import cast

import numpy as np

from graphcomp.bases import channel_dim, layer_node, relu_after, why_shared
from graphcomp.budget import Scores
from graphcomp.channels import Channels
from graphcomp.measure import Request, Zeros
from graphcomp.pipeline import Context


def activity(channels: Channels, context: Context, samples: int) -> tuple[Scores, dict[str, str]]:
    """1 - APoZ by channel id, and the groups that have none -> why."""
    asked: dict[str, Request] = {}
    unjudged: dict[str, str] = {}
    for group in channels.removable:
        node = layer_node(channels.program, group.name)
        relu = relu_after(channels.program, node)
        if (shared := why_shared(group)) is not None:
            unjudged[group.name] = shared
        elif relu is None:
            unjudged[group.name] = "no ReLU behind it, so zeros say nothing"
        else:
            asked[group.name] = Request(relu.name, "zeros", channel_dim(channels.program, node))
    counted = context.collect(channels.program, asked.values(), samples) if asked else {}
    scores = np.zeros(len(channels.channel_of))
    for group in channels.removable:
        if group.name in asked:
            zeros = cast(Zeros, counted[asked[group.name]])
            rows = group.producers[group.name]
            axis = next(a for a in channels.axes if a.role == "out" and a.layer == group.name)
            scores[axis.channels[rows]] = 1 - zeros.fraction.numpy()[rows]
    return scores, unjudged


def beyond_sigma(apoz: Scores) -> list[int]:
    """Indices with `apoz > mean + std` (population std), by more than rounding (METHODS 2.2)."""
    found: list[int] = np.flatnonzero(apoz > apoz.mean() + apoz.std() + 1e-12).tolist()
    return found
