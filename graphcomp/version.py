"""The version, where everything may read it; it is the one that `pyproject.toml` declares."""

__version__ = "0.1.0"
