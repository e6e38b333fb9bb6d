"""What a program is made of, and which of its channels are coupled, for people."""

from graphcomp.inspection.inspection import inspect, render, write_json, write_svg

__all__ = ["inspect", "render", "write_json", "write_svg"]
