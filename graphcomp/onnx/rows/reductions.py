"""Rows of reductions, and of what goes along an axis."""
