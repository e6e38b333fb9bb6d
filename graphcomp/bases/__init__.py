"""What the author of a pass derives from and works with, beside what `graphcomp` offers itself.

The second public room; see docs/writing-a-pass.md. What is not in `__all__` may move.
"""

from graphcomp.bases.compensation import Compensation
from graphcomp.bases.elimination import best_without, removal_order
from graphcomp.bases.factoring import Factoring
from graphcomp.bases.learning import Learning
from graphcomp.bases.norms import filter_norms, filters, norm_scores
from graphcomp.bases.options import (
    OPTIONS,
    TARGET,
    Asked,
    Globs,
    JoinOption,
    TargetOption,
    is_greedy,
    matches,
    not_asked,
    only_one,
    options_of,
    require_matches,
)
from graphcomp.bases.outcome import missed
from graphcomp.bases.prunable import (
    channel_dim,
    layer_node,
    prunable_relus,
    relu_after,
    unprunable_layers,
    why_shared,
)
from graphcomp.bases.ratio import RatioRemoval
from graphcomp.bases.reading import reading
from graphcomp.bases.removal import ChannelRemoval, RowRemoval
from graphcomp.bases.sensitivity import copied_values, movements
from graphcomp.bases.teacher import find_step, load_saved, load_step, no_such_step
from graphcomp.bases.training import Lesson, Recovery
from graphcomp.budget import Scores
from graphcomp.factors import irreplaceable
from graphcomp.ir import PASS_KEY, editable
from graphcomp.pipeline import Outlook
from graphcomp.records import LeftAlone

__all__ = [
    "Asked",
    "ChannelRemoval",
    "Compensation",
    "Factoring",
    "Globs",
    "JoinOption",
    "Learning",
    "LeftAlone",
    "Lesson",
    "OPTIONS",
    "Outlook",
    "PASS_KEY",
    "RatioRemoval",
    "Recovery",
    "RowRemoval",
    "Scores",
    "TARGET",
    "TargetOption",
    "best_without",
    "channel_dim",
    "copied_values",
    "editable",
    "filter_norms",
    "filters",
    "find_step",
    "irreplaceable",
    "is_greedy",
    "layer_node",
    "load_saved",
    "load_step",
    "matches",
    "missed",
    "movements",
    "no_such_step",
    "norm_scores",
    "not_asked",
    "only_one",
    "options_of",
    "prunable_relus",
    "reading",
    "relu_after",
    "removal_order",
    "require_matches",
    "unprunable_layers",
    "why_shared",
]
