"""The compression methods, one a file. `PASSES` is the only list of them.

A method is imported when it is asked for: to name them takes no torch.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphcomp.passes.apoz.apoz import APoZ
    from graphcomp.passes.cc.cc import CC
    from graphcomp.passes.dct.dct import Dct
    from graphcomp.passes.distil.distil import Distil
    from graphcomp.passes.finetune import Finetune
    from graphcomp.passes.fold_bn.fold_bn import FoldBN
    from graphcomp.passes.l1 import L1
    from graphcomp.passes.low_rank.low_rank import LowRank
    from graphcomp.passes.obs import Obs
    from graphcomp.passes.pfa.pfa import PFA
    from graphcomp.passes.play_and_prune.play_and_prune import PlayAndPrune
    from graphcomp.passes.quantize import Quantize
    from graphcomp.passes.random_ import Random
    from graphcomp.passes.refit.refit import Refit
    from graphcomp.passes.reinit import Reinit
    from graphcomp.passes.slimming import Slimming
    from graphcomp.passes.student.student import Student

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
    "Obs",
    "PlayAndPrune",
    "Quantize",
    "Random",
    "Refit",
    "Reinit",
    "Slimming",
    "Student",
]


class _Table(Mapping[str, type[Any]]):
    """Passes by name, in the order in which they are listed; each is `module:class` until it is asked for."""

    def __init__(self, places: dict[str, str]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> type[Any]:
        module, _, kind = self.places[name].partition(":")
        found: type[Any] = getattr(import_module(f"{__name__}.{module}"), kind)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.places  # Mapping's own would import it

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


_PLACES = {
    "fold-bn": "fold_bn.fold_bn:FoldBN",
    "l1": "l1:L1",
    "random": "random_:Random",
    "obs": "obs:Obs",
    "apoz": "apoz.apoz:APoZ",
    "play-and-prune": "play_and_prune.play_and_prune:PlayAndPrune",
    "slimming": "slimming:Slimming",
    "low-rank": "low_rank.low_rank:LowRank",
    "cc": "cc.cc:CC",
    "pfa": "pfa.pfa:PFA",
    "dct": "dct.dct:Dct",
    "refit": "refit.refit:Refit",
    "finetune": "finetune:Finetune",
    "reinit": "reinit:Reinit",
    "student": "student.student:Student",
    "distil": "distil.distil:Distil",
    "quantize": "quantize:Quantize",
}
PASSES: Mapping[str, type[Any]] = _Table(_PLACES)
_NAMES = {place.rpartition(":")[2]: name for name, place in _PLACES.items()}


def __getattr__(name: str) -> Any:
    """The class of a pass."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return PASSES[_NAMES[name]]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
