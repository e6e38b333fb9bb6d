"""dct: weights as low frequencies of their reordered columns (Ulicny et al. 2020)."""

from graphcomp.passes.dct.dct import Dct

__all__ = ["Dct"]
