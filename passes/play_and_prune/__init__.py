"""play-and-prune: a pruner and a controller play against each other (Singh et al. 2019)."""

from graphcomp.passes.play_and_prune.play_and_prune import PlayAndPrune

__all__ = ["PlayAndPrune"]
