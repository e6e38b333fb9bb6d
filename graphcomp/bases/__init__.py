"""What the author of a pass derives from."""

from graphcomp.bases.norms import filter_norms, filters, norm_scores
from graphcomp.bases.prunable import (
    channel_dim,
    layer_node,
    prunable_relus,
    relu_after,
    unprunable_layers,
    why_shared,
)
from graphcomp.bases.removal import (
    OPTIONS,
    TARGET,
    Asked,
    Budget,
    ChannelRemoval,
    Globs,
    JoinOption,
    RatioRemoval,
    RowRemoval,
    excluded,
    is_greedy,
    missed,
    only_one,
    options_of,
    require_matches,
)
from graphcomp.bases.training import Lesson, Recovery

__all__ = [
    "Asked",
    "Budget",
    "ChannelRemoval",
    "Globs",
    "JoinOption",
    "Lesson",
    "OPTIONS",
    "RatioRemoval",
    "Recovery",
    "RowRemoval",
    "TARGET",
    "channel_dim",
    "excluded",
    "filter_norms",
    "filters",
    "is_greedy",
    "layer_node",
    "missed",
    "norm_scores",
    "only_one",
    "options_of",
    "prunable_relus",
    "relu_after",
    "require_matches",
    "unprunable_layers",
    "why_shared",
]
