"""One operator in a network of its own: what is built, and what a time is the difference of."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from graphcomp.errors import BenchError
from graphcomp.runtime.kernel import ACTIVATIONS, Kernel, build, measure, race_timer
from graphcomp.runtime.session import open_session

CONV = Kernel("conv", (10, 9), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1))
KERNELS = {
    "conv": (CONV, 16, 32),
    "grouped": (Kernel("conv", (6, 6), (1, 1), (1, 1), (1, 1), (0,) * 4, groups=2), 8, 16),
    "dilated": (Kernel("conv", (9, 9), (3, 3), (1, 1), (2, 2), (2,) * 4), 16, 16),
    "activated": (replace(CONV, activation="relu6"), 16, 32),
    "1-d": (Kernel("conv", (12,), (3,), (1,), (1,), (1, 1)), 4, 8),
    "depthwise": (Kernel("depthwise", (6, 6), (3, 3), (1, 1), (1, 1), (1,) * 4), 16, 16),
    "linear": (Kernel("linear", ()), 5, 7),
    "tokens": (Kernel("linear", (3,)), 5, 7),
    "lstm": (Kernel("lstm", (7,)), 6, 6),
    "gru": (Kernel("gru", (7,)), 6, 6),
    "max_pool": (Kernel("max_pool", (8, 8), (3, 3), (2, 2), (1, 1), (1,) * 4), 16, 16),
    "avg_pool": (Kernel("avg_pool", (8, 8), (8, 8), (8, 8), (1, 1), (0,) * 4), 16, 16),
    **{
        op: (Kernel(op, (6, 6)), 16, 16)
        for op in (*ACTIVATIONS, "norm", "add", "mul", "scale", "concat", "move")
    },
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_built_and_runs(name: str) -> None:
    """With and without the operators, which are there as often as copies are asked for."""
    kernel, into, out = KERNELS[name]
    base, full = (build(kernel, into, out, 3, with_operator=w) for w in (False, True))
    ops = [[n.op_type for n in model.graph.node] for model in (base, full)]
    added = [op for op in set(ops[1]) if ops[1].count(op) - ops[0].count(op) >= 3]
    assert added, ops
    for model in (base, full):
        shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
        found = open_session(model.SerializeToString()).session.run(None, {"x": np.ones(shape, np.float32)})
        assert all(np.isfinite(x).all() for x in found)


@pytest.mark.parametrize("name", ["conv", "dilated", "max_pool", "avg_pool", "depthwise"])
def test_planes_are_those_of_the_runtime(name: str) -> None:
    kernel, into, out = KERNELS[name]
    model = build(kernel, into, out, 1, with_operator=True)
    graph = onnx.shape_inference.infer_shapes(model).graph
    made = graph.node[-2].output[0]
    shape = next(v for v in graph.value_info if v.name == made).type.tensor_type.shape.dim
    assert (shape[1].dim_value, *(d.dim_value for d in shape[2:])) == (out, *kernel.out_plane)


def test_copies_are_not_merged_by_the_runtime(tmp_path: Any) -> None:
    """Equal sinks of one trunk would become one, and the base would be too cheap."""
    import onnxruntime as ort

    for kernel, into, out in (KERNELS["conv"], KERNELS["hardswish"], KERNELS["add"]):
        model = build(kernel, into, out, 4, with_operator=True)
        settings = ort.SessionOptions()
        settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        settings.log_severity_level = 4
        ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        nodes = [n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node]
        assert nodes.count("MaxPool") >= 4, nodes
        assert nodes.count("Conv") >= 4, nodes


@pytest.mark.parametrize("name", ["relu6", "leaky_relu", "sigmoid", "tanh", "hardsigmoid"])
def test_activations_are_computed_inside(name: str, tmp_path: Any) -> None:
    """As the runtime does in networks: no operator of their own, and none is lost."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    settings.log_severity_level = 4
    model = build(replace(CONV, activation=name), 16, 16, 2, with_operator=True)
    ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    assert {n.op_type for n in nodes} == {"Conv", "MaxPool", "ReorderOutput"}  # of the network's outputs
    assert sum(a.name == "activation" for n in nodes for a in n.attribute) == 2


def test_a_relu6_is_clipped_at_six() -> None:
    """Also where it stands alone."""
    model = build(Kernel("relu6", (2, 2)), 16, 16, 1, with_operator=True)
    (clip,) = (n for n in model.graph.node if n.op_type == "Clip")
    limits = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
    assert [float(limits[name]) for name in clip.input[1:]] == [0.0, 6.0]


@pytest.mark.parametrize(("into", "out", "copies"), [(16, 16, 8), (64, 64, 2), (256, 256, 1)])
def test_time_is_the_difference_by_copy(into: int, out: int, copies: int) -> None:
    """Small operators are timed many at a time."""
    kernel = Kernel("conv", (56, 56), (3, 3), (1, 1), (1, 1), (1,) * 4)

    def timer(models: Any, feeds: Any) -> list[float]:
        counts = [sum(n.op_type == "Conv" for n in onnx.load_from_string(m).graph.node) for m in models]
        assert counts[1] - counts[0] == copies
        assert feeds["x"].shape == (1, 1, 56, 56)
        return [5.0, 5.0 + 3.0 * copies]

    assert measure(kernel, into, out, timer) == pytest.approx(3.0)


def test_noise_is_no_negative_time() -> None:
    assert measure(CONV, 16, 16, lambda models, feeds: [2.0, 1.9]) > 0


def test_widths_must_fit_the_groups() -> None:
    with pytest.raises(BenchError, match="found widths 6 and 7, expected positive multiples of 2"):
        measure(KERNELS["grouped"][0], 6, 7, lambda models, feeds: [1.0, 2.0])


def test_descriptions() -> None:
    assert CONV.describe() == "conv k3 s2 @ 10x9"
    assert replace(CONV, activation="relu6").describe() == "conv k3 s2 + relu6 @ 10x9"
    assert KERNELS["grouped"][0].describe() == "conv k1 s1 g2 @ 6x6"
    assert Kernel("linear", ()).describe() == "linear @ 1"


def test_one_operator_is_really_measured() -> None:
    """Nothing is said about how long it takes."""
    found = measure(CONV, 16, 16, race_timer("cpu", 1, runs=6, seconds=0.1, cold=1 << 20))
    assert found > 0
