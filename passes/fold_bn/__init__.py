"""fold-bn: see `graphcomp.passes.fold_bn.fold_bn`."""

from graphcomp.passes.fold_bn.fold_bn import FoldBN

__all__ = ["FoldBN"]
