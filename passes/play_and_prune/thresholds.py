"""Play-and-Prune's first thresholds: from which norm on the filters of a layer count (METHODS 3.4).

    W_gamma,i = the largest of layer i's norms such that C(without the filters up to it) >= C - delta0

by bisection over the sorted norms. Filters are lost as a removal would lose them, by what reads their
channels: a normalisation's shift is lost as well, but for filters of zeros, whose shift the readers' biases
take up (`channels.shifts`). A layer's threshold is kept by content (`base.cache`): a search that is
interrupted, even by kill -9, goes on at the layer where it was, and a game by other rules needs none.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from graphcomp.base import Progress, cache, distributed, quiet
from graphcomp.budget import largest
from graphcomp.channels import Channels, Removal
from graphcomp.data import Split
from graphcomp.measure import accuracy
from graphcomp.passes.play_and_prune.filters import FilterLayer
from graphcomp.passes.play_and_prune.prc import SLACK, points

KIND = "first-threshold"
"""Of entries in the cache."""


def first_thresholds(
    channels: Channels,
    layers: Mapping[str, FilterLayer],
    judges: Split,
    allowed: float,
    progress: Progress = quiet,
) -> dict[str, float]:
    """The first threshold of every layer, each for itself. Collective.

    Args:
        channels: of the program.
        layers: by name, as `find_layers` finds them in `channels`.
        judges: samples with labels.
        allowed: points of accuracy that the filters up to a threshold may cost.
        progress: told how many layers are done.
    """
    content = {"program": channels.program.fingerprint(), "judges": judges.fingerprint(), "allowed": allowed}
    found = {}
    for number, (name, layer) in enumerate(layers.items(), 1):
        key = cache.key(__name__, layer=name, **content)
        known = distributed.on_first(partial(cache.load, KIND, key))
        found[name] = known["norm"].item() if known else first_threshold(channels, layer, judges, allowed)
        if known is None and distributed.is_first():
            cache.store(KIND, key, {"norm": torch.tensor(found[name], dtype=torch.float64)})
        progress(f"threshold {number} of {len(layers)}", number / len(layers))
    return found


def first_threshold(channels: Channels, layer: FilterLayer, judges: Split, allowed: float) -> float:
    """The largest norm of a filter such that all up to it can go for `allowed` points of accuracy.

    0 if not even the smallest can. One filter always stays. Collective.
    """
    program = channels.program

    scores = np.zeros(len(channels.channel_of))
    scores[layer.channels] = layer.norms

    def judged(threshold: float) -> float:
        below = Removal.of(channels, layer.channels[layer.norms <= threshold])
        return points(accuracy(below.legal(scores).mask(), judges, shared=True))

    whole = points(accuracy(program, judges, shared=True))
    steps = np.unique(layer.norms)[:-1].tolist()
    index = largest(steps, lambda threshold: judged(threshold) >= whole - allowed - SLACK)
    return 0.0 if index is None else float(steps[index])
