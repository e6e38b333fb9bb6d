"""Grids of recipes: run, resumed, and shown on one page."""
