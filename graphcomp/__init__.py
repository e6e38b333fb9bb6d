"""graphcomp: makes trained CNNs smaller and measurably faster.

import graphcomp

program = graphcomp.trace(model, torch.randn(1, 3, 224, 224))
print(program)                                            # one node a line
print(graphcomp.analyse(program).removable)               # coupled channel groups
small = graphcomp.compile(program, "fold-bn, l1{target=macs:0.5}").program
graphcomp.export_onnx(program, "base.onnx"); graphcomp.export_onnx(small, "small.onnx")
graphcomp.benchmark("base.onnx", "small.onnx")
graphcomp.explain("base.onnx", "small.onnx").parts          # why it is not as much faster as it is smaller
graphcomp.save(small, "small"); graphcomp.load("small")

What is not in `__all__` may move. Who writes a pass derives from what `graphcomp.bases` offers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graphcomp.errors import GraphcompError
from graphcomp.version import __version__

if TYPE_CHECKING:
    from graphcomp.api import compile
    from graphcomp.channels import ChannelGroup, Channels, analyse
    from graphcomp.compiler import Compiled, Job, build
    from graphcomp.data import Data, load_data
    from graphcomp.explanation import explain
    from graphcomp.inspection import inspect
    from graphcomp.ir import Program, apply, load, save, trace
    from graphcomp.onnx import export_onnx, quantize_onnx, read_onnx
    from graphcomp.pipeline import Context, Pass, Pipeline
    from graphcomp.records import Plan, Report
    from graphcomp.report import read_report
    from graphcomp.runtime import benchmark

__all__ = [
    "ChannelGroup",
    "Channels",
    "Compiled",
    "Context",
    "Data",
    "GraphcompError",
    "Job",
    "Pass",
    "Pipeline",
    "Plan",
    "Program",
    "Report",
    "__version__",
    "analyse",
    "apply",
    "benchmark",
    "build",
    "compile",
    "explain",
    "export_onnx",
    "inspect",
    "load",
    "load_data",
    "quantize_onnx",
    "read_onnx",
    "read_report",
    "save",
    "trace",
]

_ROOMS = {
    "api": "compile",
    "channels": "ChannelGroup Channels analyse",
    "compiler": "Compiled Job build",
    "data": "Data load_data",
    "explanation": "explain",
    "inspection": "inspect",
    "ir": "Program apply load save trace",
    "onnx": "export_onnx quantize_onnx read_onnx",
    "pipeline": "Context Pass Pipeline",
    "records": "Plan Report",
    "report": "read_report",
    "runtime": "benchmark",
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Loads a room when something of it is asked for: torch alone takes seconds."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
