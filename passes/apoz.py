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

from graphcomp.allocation import Scores
from graphcomp.calibrate import Request, Zeros
from graphcomp.channels import ChannelGroup, Channels
from graphcomp.passes._prunable import channel_dim, layer_node, relu_after, why_shared
from graphcomp.pipeline import Context
from graphcomp.removal import OPTIONS, RatioRemoval


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
            node = layer_node(channels.program, group.name)
            relu = relu_after(channels.program, node)
            if (shared := why_shared(group)) is not None:
                unjudged[group.name] = shared
            elif relu is None:
                unjudged[group.name] = "no ReLU behind it, so zeros say nothing"
            else:
                asked[group.name] = Request(relu.name, "zeros", channel_dim(channels.program, node))
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
