"""pfa: principal filter analysis (Suau et al. 2020)."""

from graphcomp.passes.pfa.pfa import PFA

__all__ = ["PFA"]
