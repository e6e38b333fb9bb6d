"""distil: see `graphcomp.passes.distil.distil`."""

from graphcomp.passes.distil.distil import Distil

__all__ = ["Distil"]
