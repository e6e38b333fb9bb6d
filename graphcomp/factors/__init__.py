"""One layer becomes several, exactly."""

from graphcomp.factors.decompose import (
    Factor,
    Kind,
    Plane,
    break_even,
    energies,
    full_ranks,
    macs_after,
    params_after,
    rank_text,
    ranks,
    read_factors,
    split_shapes,
    unfold,
)
from graphcomp.factors.layers import can_be, candidates, irreplaceable, layer_macs, planes
from graphcomp.factors.surgery import removable, rewrite, simulate

__all__ = [
    "Factor",
    "Kind",
    "Plane",
    "break_even",
    "can_be",
    "candidates",
    "energies",
    "full_ranks",
    "irreplaceable",
    "layer_macs",
    "macs_after",
    "params_after",
    "planes",
    "rank_text",
    "ranks",
    "read_factors",
    "removable",
    "rewrite",
    "simulate",
    "split_shapes",
    "unfold",
]
