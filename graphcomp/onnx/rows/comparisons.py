"""Rows of comparisons, conditions and choices."""
