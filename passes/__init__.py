"""The compression methods, one a file. `PASSES` is the only list of them."""

from typing import Any

from graphcomp.passes.apoz import APoZ
from graphcomp.passes.fold_bn import FoldBN
from graphcomp.passes.l1 import L1
from graphcomp.passes.random_ import Random

PASSES: dict[str, type[Any]] = {p.name: p for p in (FoldBN, L1, Random, APoZ)}

__all__ = ["PASSES", "APoZ", "FoldBN", "L1", "Random"]
