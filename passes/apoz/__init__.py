"""apoz: see `graphcomp.passes.apoz.apoz`."""

from graphcomp.passes.apoz.apoz import APoZ

__all__ = ["APoZ"]
