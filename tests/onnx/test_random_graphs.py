"""ONNX graphs that nobody exported: drawn node by node, and equal to ONNX Runtime or refused by name."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper

from graphcomp.channels import analyse
from graphcomp.errors import ExportError, LoadError, VerifyError
from graphcomp.onnx import export_onnx, read_onnx
from graphcomp.pipeline.verify import verify_pass
from tests.onnx.onnx_files import run, truth, typed
from tests.removing import ByRows, half, random_scores

Shape = tuple[int, int, int]
POINTWISE = """Relu Sigmoid Tanh HardSwish HardSigmoid LeakyRelu Elu Softplus Clip Abs Neg Exp Sqrt Erf
    Identity Dropout Selu Celu Softsign Floor Sign Reciprocal""".split()
PADS = ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")


@dataclass
class Graph:
    """A file in the making: every value is a batch of planes (C, H, W)."""

    draw: Any
    opset: int
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    values: dict[str, Shape] = field(default_factory=dict)

    def add(self, operator: str, inputs: list[str], shape: Shape, **attributes: Any) -> None:
        name = f"v{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(operator, inputs, [name], name=f"n{len(self.nodes)}", **attributes)
        )
        self.values[name] = shape

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(value, kind)
        return name

    def random(self, *shape: int) -> str:
        seed = self.draw(st.integers(0, 1000))
        return self.constant(np.random.default_rng(seed).normal(0, 0.5, shape))

    def pick(self) -> str:
        return str(self.draw(st.sampled_from(sorted(self.values))))

    def choose(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))


def convolution(g: Graph, x: str) -> None:
    c, h, w = g.values[x]
    groups = g.choose(*(d for d in (1, 2, c) if c % d == 0))
    out = groups * g.choose(1, 2, 3)
    k, stride, dilation = g.choose(1, 2, 3), g.choose(1, 2), g.choose(1, 2)
    weights = [g.random(out, c // groups, k, k), *([g.random(out)] if g.choose(True, False) else [])]
    auto = g.choose(*PADS) if dilation == 1 else "NOTSET"
    pads = [g.choose(0, 1, 2) for _ in range(4)]
    if auto == "NOTSET":
        sizes = [
            (n + pads[i] + pads[i + 2] - dilation * (k - 1) - 1) // stride + 1 for i, n in enumerate((h, w))
        ]
        attributes: dict[str, Any] = {"pads": pads, "dilations": [dilation] * 2}
    elif auto == "VALID":
        sizes, attributes = [(n - k) // stride + 1 for n in (h, w)], {"auto_pad": auto}
    else:
        sizes, attributes = [-(-n // stride) for n in (h, w)], {"auto_pad": auto}
    if min(sizes) > 0:
        g.add("Conv", [x, *weights], (out, *sizes), group=groups, strides=[stride] * 2, **attributes)


def transposed(g: Graph, x: str) -> None:
    c, h, w = g.values[x]
    stride, k, out = g.choose(1, 2), g.choose(2, 3), g.choose(1, 2, 4)
    weight = g.random(c, out, k, k)
    if max(h, w) <= 8:
        g.add(
            "ConvTranspose",
            [x, weight],
            (out, (h - 1) * stride + k, (w - 1) * stride + k),
            strides=[stride] * 2,
        )


def pool(g: Graph, x: str) -> None:
    c, h, w = g.values[x]
    k, stride = g.choose(2, 3), g.choose(1, 2)
    operator = g.choose("MaxPool", "AveragePool")
    attributes: dict[str, Any] = {"kernel_shape": [k, k], "strides": [stride, stride]}
    pads = [g.choose(0, 1)] * 4
    if operator == "AveragePool":
        attributes["count_include_pad"] = g.choose(0, 1)
    sizes = [(n + 2 * pads[0] - k) // stride + 1 for n in (h, w)]
    if min(sizes) > 0:
        g.add(operator, [x], (c, *sizes), pads=pads, **attributes)


def pointwise(g: Graph, x: str) -> None:
    operator = g.choose(*(name for name in POINTWISE if name != "HardSwish" or g.opset > 13))
    inputs = [x]
    if operator == "Clip":
        inputs += [g.constant(-0.5), g.constant(0.75)]
    if operator in ("Sqrt", "Reciprocal"):
        g.add("Abs", [x], g.values[x])
        g.add("Add", [f"v{len(g.nodes) - 1}", g.constant(0.5)], g.values[x])
        inputs = [f"v{len(g.nodes) - 1}"]
    if operator == "Exp":
        g.add("Tanh", [x], g.values[x])
        inputs = [f"v{len(g.nodes) - 1}"]
    g.add(operator, inputs, g.values[x])


def scaled(g: Graph, x: str) -> None:
    c, h, w = g.values[x]
    shape = g.choose((c, 1, 1), (1, c, 1, 1), (1,), (w,), (h, 1), (c, h, w))
    g.add(g.choose("Add", "Mul", "Sub", "Max", "Min"), [x, g.random(*shape)], (c, h, w))


def joined(g: Graph, x: str) -> None:
    y = g.pick()
    a, b = g.values[x], g.values[y]
    if a == b:
        g.add(g.choose("Add", "Mul", "Sub", "Max", "Sum"), [x, y], a)
    elif a[1:] == b[1:] and a[0] + b[0] <= 16:
        g.add("Concat", [x, y], (a[0] + b[0], *a[1:]), axis=g.choose(1, -3))


def normalised(g: Graph, x: str) -> None:
    c, h, w = g.values[x]
    if g.choose(True, False):
        positive = g.constant(np.random.default_rng(c).uniform(0.5, 2, c))
        g.add(
            "BatchNormalization",
            [x, g.random(c), g.random(c), g.random(c), positive],
            (c, h, w),
            epsilon=1e-3,
        )
    elif h * w > 1:
        g.add("InstanceNormalization", [x, g.random(c), g.random(c)], (c, h, w))


def moved(g: Graph, x: str) -> None:
    c, h, w = g.values[x]
    which = g.choose("slice", "split", "pad", "shuffle", "transpose", "gather", "resize", "depth")
    if which == "slice" and c > 1:
        begin, end = sorted((g.draw(st.integers(0, c - 1)), g.draw(st.integers(1, c))))
        if end > begin:
            given = [g.constant([v], np.int64) for v in (begin, end, 1, 1)]
            g.add("Slice", [x, *given], (end - begin, h, w))
    elif which == "pad":
        pads = [0, 0, g.choose(0, 1), g.choose(0, 2), 0, g.choose(0, 1), g.choose(0, 1), 0]
        shape = (c + pads[5], h + pads[2] + pads[6], w + pads[3] + pads[7])
        g.add("Pad", [x, g.constant(pads, np.int64), g.constant(g.choose(0.0, 0.5))], shape)
    elif which == "shuffle" and c % 2 == 0:
        g.add("Reshape", [x, g.constant([0, 2, c // 2, h, w], np.int64)], (c, h, w))
        a = f"v{len(g.nodes) - 1}"
        del g.values[a]
        g.add("Transpose", [a], (c, h, w), perm=[0, 2, 1, 3, 4])
        b = f"v{len(g.nodes) - 1}"
        del g.values[b]
        g.add("Reshape", [b, g.constant([g.choose(0, -1), c, h, w], np.int64)], (c, h, w))
    elif which == "transpose":
        g.add("Transpose", [x], (c, w, h), perm=[0, 1, 3, 2])
    elif which == "gather":
        index = [g.draw(st.integers(-c, c - 1)) for _ in range(g.choose(1, 2, 3))]
        g.add("Gather", [x, g.constant(index, np.int64)], (len(index), h, w), axis=1)
    elif which == "resize" and max(h, w) <= 8:
        scales = g.constant([1, 1, 2, 2])
        mode, coordinates = g.choose(
            ("nearest", "asymmetric"), ("linear", "half_pixel"), ("linear", "align_corners")
        )
        rounding = {"nearest_mode": "floor"} if mode == "nearest" else {}
        g.add(
            "Resize", [x, "", scales], (c, 2 * h, 2 * w),
            mode=mode, coordinate_transformation_mode=coordinates, **rounding,
        )  # fmt: skip
    elif which == "depth" and c % 4 == 0:
        g.add("DepthToSpace", [x], (c // 4, 2 * h, 2 * w), blocksize=2, mode=g.choose("DCR", "CRD"))


def gated(g: Graph, x: str) -> None:
    c, h, w = g.values[x]
    g.add("GlobalAveragePool", [x], (c, 1, 1))
    squeezed = f"v{len(g.nodes) - 1}"
    g.add("Conv", [squeezed, g.random(c, c, 1, 1), g.random(c)], (c, 1, 1))
    g.add("Sigmoid", [f"v{len(g.nodes) - 1}"], (c, 1, 1))
    g.add("Mul", [x, f"v{len(g.nodes) - 1}"], (c, h, w))


STEPS = (
    convolution,
    convolution,
    transposed,
    pool,
    pointwise,
    pointwise,
    scaled,
    joined,
    joined,
    normalised,
    moved,
    gated,
)


def _unread(g: Graph) -> list[str]:
    read = {name for node in g.nodes for name in node.input}
    return [o for node in g.nodes for o in node.output if o not in read]


@st.composite
def files(draw: Any) -> onnx.ModelProto:
    """A file of one input, of 2 to 8 steps; every value that nobody reads is an output."""
    g = Graph(draw, draw(st.sampled_from([13, 15, 17, 18, 20])))
    g.values["x"] = (draw(st.sampled_from([2, 3, 4])), draw(st.sampled_from([4, 5, 6])), 6)
    shape = g.values["x"]
    g.add("Conv", ["x", g.random(6, shape[0], 1, 1), g.random(6)], (6, *shape[1:]))
    del g.values["x"]
    for _ in range(draw(st.integers(2, 8))):
        draw(st.sampled_from(STEPS))(g, g.pick())
    for value in _unread(g):  # channels of outputs stay: something must read them
        width = g.values.get(value, (0,))[0]
        if width and draw(st.booleans()):
            g.add("Conv", [value, g.random(2, width, 1, 1)], (2, *g.values[value][1:]))
    outputs = _unread(g)
    model = helper.make_model(
        helper.make_graph(
            g.nodes,
            "random",
            [
                helper.make_tensor_value_info(
                    "x", TensorProto.FLOAT, [draw(st.sampled_from(["n", 1])), *shape]
                )
            ],
            [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
            [numpy_helper.from_array(v, k) for k, v in g.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", g.opset)],
        ir_version=8,
    )
    return typed(model)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(files())
def test_a_drawn_file_is_equal_or_refused(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drawn.onnx"
        path.write_bytes(model.SerializeToString())
        try:
            program = read_onnx(path)
        except LoadError as error:
            assert any(
                name in str(error) for name in [n.name for n in model.graph.node] + ["output", "input"]
            )
            return
        fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
        for batch in (1,) if fixed else (1, 3):
            shape = (batch, *program.example_inputs[0].shape[1:])
            feeds = {"x": np.random.default_rng(7).normal(size=shape).astype(np.float32)}
            for found, expected in zip(run(program, feeds), truth(model, feeds), strict=True):
                assert found.shape == expected.shape
                peak = max(1e-2, float(np.abs(expected).max()))
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * peak)
        double = program.to(program.example_inputs[0].double().dtype)
        removal, _ = half(analyse(double)).feasible(random_scores(analyse(double)))
        if len(removal):
            try:
                verify_pass(ByRows(), double, removal.rows)
            except VerifyError as error:  # so says the check of a network that a removal makes constant
                assert "hardly depend on the inputs" in str(error)
        written = Path(folder) / "written.onnx"
        if any("without fusions" in said for said in program.interface.remarks):
            # the runtime adds the pads of a Pad to those of a pool behind it, and then refuses their sum
            with pytest.raises(ExportError, match="cannot load it"):
                export_onnx(program, written, batches=(1,) if fixed else (1, 3))
            return
        export_onnx(program, written, batches=(1,) if fixed else (1, 3))
        assert len(onnx.load(written).graph.node) > 0
