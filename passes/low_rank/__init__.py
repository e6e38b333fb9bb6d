"""low-rank: see `graphcomp.passes.low_rank.low_rank`."""

from graphcomp.passes.low_rank.low_rank import LowRank

__all__ = ["LowRank"]
