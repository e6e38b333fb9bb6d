"""refit: layers of a compressed network fitted again, in closed form, to what the original computed."""

from graphcomp.passes.refit.refit import Refit

__all__ = ["Refit"]
