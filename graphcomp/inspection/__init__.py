"""What a program is made of, and which of its channels are coupled, for people."""

from graphcomp.inspection.drawing import write_svg
from graphcomp.inspection.graphs import grouped, write_dot, write_graphml
from graphcomp.inspection.inspection import inspect, write_json
from graphcomp.inspection.text import render

__all__ = ["grouped", "inspect", "render", "write_dot", "write_graphml", "write_json", "write_svg"]
