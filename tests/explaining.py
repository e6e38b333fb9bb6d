"""Two networks whose gap between theory and practice has every part, and traces of them that were recorded.

`python -m tests.explaining` records them again, on a machine with AVX-512: `tests/traces/*.json` hold what
`explanation.profiling` reads, times included.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphcomp import records
from graphcomp.explanation import profiling
from graphcomp.explanation.attribution import AttributedKernel, attribute
from graphcomp.explanation.profiling import Node, Profile
from graphcomp.runtime import onnxfile
from graphcomp.runtime.turns import random_inputs

TRACES = Path(__file__).parent / "traces"
ENVIRONMENT = records.Environment(
    python="3.11.9", platform="Linux", cpu="some CPU", isa="avx512", cores=2, versions={}
)


class Net:
    """An ONNX file as the exporter writes it, node by node; `base` networks have no pass."""

    def __init__(self, made_by: str) -> None:
        self.made_by, self.weights = made_by, list[onnx.TensorProto]()
        self.nodes: list[onnx.NodeProto] = []
        self.rng = np.random.default_rng(0)

    def add(
        self, op: str, inputs: Sequence[str], module: str, made_by: str = "trace", **attributes: Any
    ) -> str:
        """`module` is the fx node's name with dots; the tensor has the name of the node."""
        key = module.replace(".", "_")
        node = helper.make_node(op, inputs, [key], name=f"node_{key}", **attributes)
        for name, value in (("module", module), ("node", key), ("pass", made_by)):
            node.metadata_props.add(key=f"graphcomp.{name}", value=value)
        self.nodes.append(node)
        return key

    def constant(self, values: Any) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape).astype(np.float32) / 8)

    def conv(self, x: str, module: str, into: int, out: int, *, size: int = 3, stride: int = 1) -> str:
        pads = [size // 2] * 4
        inputs = [x, self.weight(out, into, size, size)]
        return self.add("Conv", inputs, module, self.made_by, pads=pads, strides=[stride] * 2)

    def relu(self, x: str, module: str) -> str:
        return self.add("Relu", [x], module)

    def head(self, x: str, width: int) -> None:
        pooled = self.add("GlobalAveragePool", [x], "pool")
        flat = self.add("Flatten", [pooled], "flatten")
        self.add("Gemm", [flat, self.weight(width, 10)], "fc", self.made_by)

    def write(self, path: Path, size: int = 16) -> Path:
        shapes = {"input": ["n", 3, size, size], self.nodes[-1].output[0]: ["n", 10]}
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
        graph = helper.make_graph(self.nodes, "net", ends[:1], ends[1:], self.weights)
        opsets = [helper.make_opsetid("", 18)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
        return path


def base(path: Path) -> Path:
    """conv, relu; conv, relu, conv, add, relu; conv stride 2, relu; pool, linear: widths 32 and 64."""
    net = Net("trace")
    x = net.relu(net.conv("input", "stem", 3, 32), "relu")
    y = net.relu(net.conv(x, "block.conv1", 32, 32), "relu_1")
    y = net.conv(y, "block.conv2", 32, 32)
    x = net.relu(net.add("Add", [y, x], "add"), "relu_2")
    x = net.relu(net.conv(x, "last", 32, 64, stride=2), "relu_3")
    net.head(x, 64)
    return net.write(path)


def pruned(path: Path) -> Path:
    """The same with inner widths 21 (another kernel) and a padded join, the last of 64 filters cut to 40."""
    net = Net("l1")
    x = net.relu(net.conv("input", "stem", 3, 32), "relu")
    y = net.relu(net.conv(x, "block.conv1", 32, 21), "relu_1")
    y = net.conv(y, "block.conv2", 21, 24)
    y = net.add("Pad", [y, net.constant(np.array([0, 0, 0, 0, 0, 8, 0, 0]))], "pad", "l1")
    x = net.relu(net.add("Add", [y, x], "add", "l1"), "relu_2")
    x = net.relu(net.conv(x, "last", 32, 40, stride=2), "relu_3")
    net.head(x, 40)
    return net.write(path)


def factored(path: Path) -> Path:
    """The base with `block.conv1` and `last` in two factors each."""
    net = Net("low-rank")
    x = net.relu(net.conv("input", "stem", 3, 32), "relu")
    y = net.conv(net.conv(x, "block.conv1.0", 32, 16), "block.conv1.1", 16, 32, size=1)
    y = net.conv(net.relu(y, "relu_1"), "block.conv2", 32, 32)
    x = net.relu(net.add("Add", [y, x], "add"), "relu_2")
    y = net.conv(net.conv(x, "last.0", 32, 16, stride=2), "last.1", 16, 64, size=1)
    net.head(net.relu(y, "relu_3"), 64)
    return net.write(path)


NETS = {"base": base, "pruned": pruned, "factored": factored}


def recorded(name: str) -> Profile:
    """A profile that was recorded on AVX-512."""
    stored = json.loads((TRACES / f"{name}.json").read_text())
    graph = tuple(
        Node(n["name"], n["op"], n["domain"], tuple(n["inputs"]), tuple(n["outputs"]))
        for n in stored["graph"]
    )
    return profiling.read_trace(stored["events"], graph, "cpu", name, cost_ms=stored["cost_ms"])


def kernels(folder: Path, name: str) -> list[AttributedKernel]:
    """Its operators with their layers and passes."""
    file = onnxfile.read(NETS[name](folder / f"{name}.onnx"))
    return attribute(file, recorded(name), 1)


def timing(base_ms: float, new_ms: float, theoretical: float, busy: bool = False) -> records.BatchTiming:
    """A benchmark's row of known medians; CPU time is 1 % less."""

    def stats(ms: float) -> records.TimingStats:
        return records.TimingStats(
            runs=200, first_ms=9.0, median_ms=ms, p90_ms=ms, p99_ms=ms, cpu_median_ms=0.99 * ms
        )

    ratio = base_ms / new_ms
    speedup = records.Interval(value=ratio, low=0.98 * ratio, high=1.02 * ratio)
    return records.BatchTiming(
        batch=1,
        base=stats(base_ms),
        new=stats(new_ms),
        speedup=speedup,
        cpu_speedup=speedup,
        theoretical=theoretical,
        busy=busy,
        verdict="faster",
    )


def bench(row: records.BatchTiming, provider: str = "cpu") -> records.Bench:
    """A benchmark of one row."""
    file = records.ModelFile(
        path="x.onnx", sha256="ab", bytes=1, macs=1, load_seconds=0.1, nodes_per_provider={}
    )
    return records.Bench(
        provider=provider,
        provider_options={},
        threads=1,
        base=file,
        new=file,
        batches=[row],
        environment=ENVIRONMENT,
    )


def _record(folder: Path, runs: int = 9) -> None:
    """Trace every network; arguments are kept once for every node, since they do not change."""
    cost = profiling.trace_cost()
    for name, build in NETS.items():
        file = onnxfile.read(build(folder / f"{name}.onnx"))
        dump, trace = folder / f"{name}-optimised.onnx", folder / name
        opened = profiling.open_session(file.path, "cpu", 1, dump=dump, profile=trace)
        feeds = random_inputs(file, 1, 0)
        for _ in range(runs):
            opened.session.run(None, feeds)
        events, seen = [], set[str]()
        for event in json.loads(Path(opened.session.end_profiling()).read_text()):
            if event["cat"] == "Node" or event["name"] == "model_run":
                kept = {key: event[key] for key in ("cat", "name", "dur")}
                if event["cat"] == "Node" and event["name"] not in seen:
                    keys = ("provider", "op_name", "input_type_shape", "output_type_shape")
                    kept["args"] = {key: event["args"][key] for key in keys}
                seen.add(event["name"])
                events.append(kept)
        nodes = [asdict(node) for node in profiling._graph(dump)]
        lines = ",\n".join(json.dumps(item, separators=(",", ":")) for item in events)
        graph = ",\n".join(json.dumps(item, separators=(",", ":")) for item in nodes)
        text = f'{{"cost_ms": {cost:.6f},\n"graph": [\n{graph}],\n"events": [\n{lines}]}}\n'
        (TRACES / f"{name}.json").write_text(text)


if __name__ == "__main__":
    import tempfile

    TRACES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        _record(Path(temporary))
