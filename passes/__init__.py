"""The compression methods, one a file. `PASSES` is the only list of them."""

from typing import Any

from graphcomp.passes.apoz import APoZ
from graphcomp.passes.cc import CC
from graphcomp.passes.dct import Dct
from graphcomp.passes.finetune import Finetune
from graphcomp.passes.fold_bn import FoldBN
from graphcomp.passes.l1 import L1
from graphcomp.passes.low_rank import LowRank
from graphcomp.passes.pfa import PFA
from graphcomp.passes.play_and_prune import PlayAndPrune
from graphcomp.passes.random_ import Random

PASSES: dict[str, type[Any]] = {
    p.name: p for p in (FoldBN, L1, Random, APoZ, PlayAndPrune, LowRank, CC, PFA, Dct, Finetune)
}

__all__ = [
    "CC",
    "PASSES",
    "PFA",
    "APoZ",
    "Dct",
    "Finetune",
    "FoldBN",
    "L1",
    "LowRank",
    "PlayAndPrune",
    "Random",
]
