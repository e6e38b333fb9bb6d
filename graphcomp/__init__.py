"""graphcomp: makes trained CNNs smaller and measurably faster.

import graphcomp

program = graphcomp.trace(model, torch.randn(1, 3, 224, 224))
print(program)                                            # one node a line
print(graphcomp.analyse(program).removable)               # coupled channel groups
small = graphcomp.compile(program, "fold-bn, l1{target=macs:0.5}").program
graphcomp.export_onnx(program, "base.onnx"); graphcomp.export_onnx(small, "small.onnx")
graphcomp.benchmark("base.onnx", "small.onnx")
graphcomp.explain("base.onnx", "small.onnx").parts          # why it is not as much faster as it is smaller
small.save("small"); graphcomp.load("small")
"""

__version__ = "0.1.0"

from graphcomp.api import benchmark, compile, explain, export_onnx, load
from graphcomp.channels import ChannelGroup, Channels, analyse
from graphcomp.compiler import Compiled
from graphcomp.data import Data, load_data
from graphcomp.errors import GraphcompError
from graphcomp.ir import Program, trace
from graphcomp.pipeline import Context, Pass, Pipeline, Plan
from graphcomp.records import Report

__all__ = [
    "ChannelGroup",
    "Channels",
    "Compiled",
    "Context",
    "Data",
    "GraphcompError",
    "Pass",
    "Pipeline",
    "Plan",
    "Program",
    "Report",
    "__version__",
    "analyse",
    "benchmark",
    "compile",
    "explain",
    "export_onnx",
    "load",
    "load_data",
    "trace",
]
