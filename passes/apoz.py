"""apoz: average percentage of zeros (Hu et al. 2016, "Network Trimming"; rule: Aghli & Ribeiro 2021).

    APoZ_c = share of entries of channel c, after convolution, normalisation and ReLU, that are exactly 0
             over all samples and positions                                                  (METHODS 2.1)
    remove { c : APoZ_c > mu + sigma },  mu and sigma over the layer's channels, sigma with ddof = 0     (2.2)

Only layers whose channels no other layer shares (no residual addition) and that feed a ReLU or ReLU6 are
judged. With `ratio` or `target` the order is the same and the count is theirs.
"""

from typing import Annotated, ClassVar, cast

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import fx, nn

from graphcomp.allocation import Scores
from graphcomp.calibrate import Request, Zeros
from graphcomp.channels import ChannelGroup, Channels
from graphcomp.pipeline import Context
from graphcomp.program import Program
from graphcomp.removal import OPTIONS, RatioRemoval
from graphcomp.rules import op_name


@dataclass(frozen=True, config=OPTIONS)
class APoZ(RatioRemoval):
    """Remove the channels that are most often zero after their ReLU: one step, without fine-tuning."""

    name: ClassVar[str] = "apoz"
    needs_amount: ClassVar[bool] = False

    samples: Annotated[int, Field(ge=1, description="calibration samples")] = 1000
    max_fraction: Annotated[
        float, Field(gt=0, lt=1, description="of a layer, at most, by the sigma rule")
    ] = 0.5

    def score(self, channels: Channels, context: Context) -> tuple[Scores, dict[str, str]]:
        """1 - APoZ."""
        asked: dict[str, Request] = {}
        unjudged: dict[str, str] = {}
        for group in channels.removable:
            node = _layer_node(channels.program, group.name)
            relu = _relu_after(channels.program, node)
            if len(group.producers) > 1:
                unjudged[group.name] = (
                    f"its channels are shared with {len(group.producers) - 1} other layer(s)"
                )
            elif relu is None:
                unjudged[group.name] = "no ReLU behind it, so zeros say nothing"
            else:
                asked[group.name] = Request(relu.name, "zeros", _channel_dim(channels.program, node))
        counted = context.collect(channels.program, asked.values(), self.samples) if asked else {}
        scores = np.zeros(len(channels.channel_of))
        for group in channels.removable:
            if group.name in asked:
                zeros = cast(Zeros, counted[asked[group.name]])
                rows = group.producers[group.name]
                axis = next(
                    a for a in channels.axes if a.role == "out" and a.tensors[0][0] == f"{group.name}.weight"
                )
                scores[axis.channels[rows]] = 1 - zeros.fraction.numpy()[rows]
        return scores, unjudged

    def own_count(self, scores: Scores, group: ChannelGroup) -> int:
        """The sigma rule."""
        gone = beyond_sigma(1 - scores[group.channels])
        return len(group.channels) - min(len(gone), int(self.max_fraction * len(group.channels)))


def beyond_sigma(apoz: Scores) -> list[int]:
    """Indices with `apoz > mean + std` (population std), by more than rounding (METHODS 2.2)."""
    found: list[int] = np.flatnonzero(apoz > apoz.mean() + apoz.std() + 1e-12).tolist()
    return found


def _layer_node(program: Program, layer: str) -> fx.Node | None:
    return next((n for n in program.graph.nodes if n.op == "call_module" and n.target == layer), None)


def _channel_dim(program: Program, node: fx.Node | None) -> int:
    """Dimension of a layer's channels: the last of a linear layer, else the second."""
    assert node is not None  # a layer with a ReLU behind it
    return -1 if isinstance(program.layer(cast(str, node.target)), nn.Linear) else 1


def _relu_after(program: Program, node: fx.Node | None) -> fx.Node | None:
    """The ReLU that a layer feeds, directly or through a normalisation, and nothing else."""
    while node is not None:
        users = list(node.users)
        if len(users) != 1:
            return None
        node = users[0]
        module = program.layer(cast(str, node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.ReLU | nn.ReLU6) or (module is None and op_name(node) in ("relu", "relu6")):
            return node
        if not isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Identity | nn.Dropout):
            return None
    return None
