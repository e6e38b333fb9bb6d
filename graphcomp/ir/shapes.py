"""Shapes of tensors, for whoever knows no network."""

Shape = tuple[int, ...]
"""Sizes, outermost dimension first."""
