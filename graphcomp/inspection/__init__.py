"""What a program is made of, and which of its channels are coupled, for people."""

from graphcomp.inspection.graphs import grouped, write_dot, write_graphml
from graphcomp.inspection.inspection import inspect, render, write_json, write_svg

__all__ = ["grouped", "inspect", "render", "write_dot", "write_graphml", "write_json", "write_svg"]
