"""cc: collaborative compression (Li et al. 2021)."""

from graphcomp.passes.cc.cc import CC

__all__ = ["CC"]
