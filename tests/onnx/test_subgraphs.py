"""Bodies of If and Loop read what lies around them: what drops or renames values has to know."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from graphcomp.errors import LoadError
from graphcomp.onnx import read_onnx
from graphcomp.onnx.half import with_full_weights
from graphcomp.onnx.quantization.layers import find_layers
from graphcomp.onnx.quantization.qdq import correct_biases
from graphcomp.onnx.quantization.shield import leave_outputs
from graphcomp.onnx.reading.eight_bits import with_float_weights, without_rounding
from tests.onnx.onnx_files import OPEN, make, run, save, truth

F32 = np.float32
node = helper.make_node


def body(nodes: list[NodeProto], result: str, **constants: np.ndarray) -> GraphProto:
    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    return helper.make_graph(nodes, "body", [], [helper.make_tensor_value_info(result, 1, None)], held)


def choice(source: str, result: str, then: GraphProto) -> NodeProto:
    other = body([node("Identity", [source], [f"other_{result}"])], f"other_{result}")
    return node("If", ["is"], [result], name=f"if_{result}", then_branch=then, else_branch=other)


def beside(nodes: list[NodeProto], inner: NodeProto, **constants: np.ndarray) -> ModelProto:
    """A body adds what it makes of the values around it to `h`, on a condition that an input has."""
    then = body([inner, node("Add", ["h", "inner"], ["sum"])], "sum")
    given = {"x": (OPEN, 4), "is": (1,)}
    model = make([*nodes, choice("h", "y", then)], given, constants, kinds={"is": TensorProto.BOOL})
    model.ir_version = 8
    return model


def then_of(model: ModelProto) -> GraphProto:
    return next(a.g for a in model.graph.node[-1].attribute if a.name == "then_branch")


def assert_same(model: ModelProto, before: ModelProto) -> None:
    feeds = {"x": np.random.default_rng(0).normal(size=(3, 4)).astype(F32), "is": np.array([True])}
    np.testing.assert_allclose(truth(model, feeds)[0], truth(before, feeds)[0], rtol=1e-5)


def copied(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


@pytest.mark.parametrize("nested", [False, True])
def test_float16_weights_that_a_body_reads_stay(nested: bool) -> None:
    inner = node("Cast", ["half"], ["inner"], to=1)
    model = beside([node("Relu", ["x"], ["h"])], inner, half=np.array([1, 2, 3, 4], np.float16))
    if nested:
        outer = body([choice("h", "deep", then_of(model))], "deep")
        model.graph.node[-1].CopyFrom(choice("h", "y", outer))
    before = copied(model)
    with_full_weights(model)
    assert_same(model, before)


def test_corrected_biases_leave_what_a_body_reads() -> None:
    bias = np.arange(4, dtype=F32)
    nodes = [node("Gemm", ["x", "w", "b"], ["h"], name="gemm")]
    model = beside(nodes, node("Identity", ["b"], ["inner"]), w=np.eye(4, dtype=F32), b=bias)
    before, (layer,) = copied(model), find_layers(model)[0]
    scales, weights = {layer.weight: np.full(4, 1 / 127, F32)}, {layer.weight: 127 * np.eye(4, dtype=np.int8)}
    correct_biases(model, [layer], scales, weights, {layer.x: np.zeros(4)})
    assert_same(model, before)


def rounded(source: str, result: str) -> list[NodeProto]:
    return [
        node("QuantizeLinear", [source, "scale", "zero"], [f"{result}_bytes"]),
        node("DequantizeLinear", [f"{result}_bytes", "scale", "zero"], [result]),
    ]


SCALE = {"scale": F32(0.05), "zero": np.uint8(128)}


def test_an_output_that_a_body_reads_too_stays_rounded() -> None:
    nodes = [node("Gemm", ["x", "w"], ["h"], name="gemm"), *rounded("h", "z")]
    model = beside(nodes, node("Identity", ["h"], ["inner"]), w=np.eye(4, dtype=F32), **SCALE)
    model.graph.output.append(helper.make_tensor_value_info("z", 1, [None, 4]))
    before = copied(model)
    leave_outputs(model)
    assert_same(model, before)


def test_what_a_body_reads_is_taken_out_of_8_bits_with_it() -> None:
    """A weight that gets the float file's name, what is rounded, and bytes that only the body dequantises."""
    stored = np.array([1, -2, 3, -4], np.int8)
    nodes = [
        node("DequantizeLinear", ["stored", "scale"], ["v_DequantizeLinear_Output"]),
        node("Relu", ["x"], ["r"]), *rounded("r", "h"),
        node("QuantizeLinear", ["x", "scale", "zero"], ["bytes"]),
    ]  # fmt: skip
    inner = node("Mul", ["v_DequantizeLinear_Output", "deep"], ["inner"])
    model = beside(nodes, inner, stored=stored, **SCALE)
    read = node("DequantizeLinear", ["bytes", "scale", "zero"], ["deep"])
    then_of(model).node.insert(0, read)
    fine = copied(model)
    with_float_weights(model)
    assert_same(model, fine)
    assert without_rounding(model)
    kinds = [n.op_type for n in model.graph.node]
    assert kinds == ["Relu", "QuantizeLinear", "If"]
    feeds = {"x": np.ones((1, 4), F32), "is": np.array([True])}
    expected = 1 + stored.astype(F32) * 0.05
    np.testing.assert_allclose(truth(model, feeds)[0], [expected], rtol=1e-5)


def constant_choices(model_last: list[NodeProto], *bodies: GraphProto) -> ModelProto:
    sources = ["x", "a", "b"]
    nodes = [choice(sources[i], "ab"[i], each) for i, each in enumerate(bodies)]
    return make([*nodes, *model_last], {"x": (OPEN, 4)}, {"is": np.array([True])})


def test_two_bodies_may_have_one_name_for_two_values(tmp_path: Path) -> None:
    first = body([node("Add", ["x", "k"], ["t"])], "t", k=np.arange(4, dtype=F32))
    second = body([node("Mul", ["a", "k"], ["t"])], "t", k=np.full(4, 3, F32))
    model = constant_choices([node("Identity", ["b"], ["y"])], first, second)
    x = np.ones((2, 4), F32)
    (found,) = run(read_onnx(save(model, tmp_path)), {"x": x})
    np.testing.assert_allclose(found, (x + np.arange(4)) * 3)


def test_a_name_of_a_body_that_is_there_already_is_refused(tmp_path: Path) -> None:
    inside = body([node("Add", ["x", "is"], ["t"])], "t", **{"is": np.arange(4, dtype=F32)})
    path = tmp_path / "model.onnx"
    onnx.save(constant_choices([node("Identity", ["a"], ["y"])], inside), path)
    with pytest.raises(LoadError, match="If 'if_a': found a second 'is', expected a name for each value"):
        read_onnx(path)
