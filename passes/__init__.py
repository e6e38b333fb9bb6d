"""The compression methods, one a file. `PASSES` is the only list of them."""

from typing import Any

from graphcomp.passes.apoz import APoZ
from graphcomp.passes.cc.cc import CC
from graphcomp.passes.dct.dct import Dct
from graphcomp.passes.distil import Distil
from graphcomp.passes.finetune import Finetune
from graphcomp.passes.fold_bn import FoldBN
from graphcomp.passes.l1 import L1
from graphcomp.passes.low_rank import LowRank
from graphcomp.passes.pfa.pfa import PFA
from graphcomp.passes.play_and_prune.play_and_prune import PlayAndPrune
from graphcomp.passes.random_ import Random
from graphcomp.passes.slimming import Slimming
from graphcomp.passes.student import Student

PASSES: dict[str, type[Any]] = {
    p.name: p
    for p in (
        FoldBN,
        L1,
        Random,
        APoZ,
        PlayAndPrune,
        Slimming,
        LowRank,
        CC,
        PFA,
        Dct,
        Finetune,
        Student,
        Distil,
    )
}

__all__ = [
    "CC",
    "PASSES",
    "PFA",
    "APoZ",
    "Dct",
    "Distil",
    "Finetune",
    "FoldBN",
    "L1",
    "LowRank",
    "PlayAndPrune",
    "Random",
    "Slimming",
    "Student",
]
