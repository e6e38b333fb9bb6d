"""What is known when a file is read is what ONNX Runtime computes, and is held once."""

from typing import Any

import numpy as np
import pytest
from onnx import helper

from graphcomp.errors import LoadError
from graphcomp.ir import Program
from graphcomp.onnx.reading.known import evaluate
from graphcomp.onnx.rows import Known
from tests.onnx.onnx_files import OPEN, make, read_unchecked, run, truth

F32 = np.float32


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(F32)


MISTAKEN: dict[str, tuple[int, list[np.ndarray], dict[str, Any]]] = {
    "Softmax": (11, [numbers(2, 3, 4)], {}),
    "LogSoftmax": (12, [numbers(2, 3, 4)], {"axis": 1}),
    "Hardmax": (11, [numbers(2, 3, 4)], {"axis": 1}),
    "LpNormalization": (18, [numbers(2, 3)], {"p": 1}),
}
"""What ONNX's reference has wrong."""

MISSING: dict[str, tuple[int, list[np.ndarray], dict[str, Any]]] = {
    "Upsample": (9, [numbers(1, 1, 4, 4), np.array([1, 1, 2, 2], F32)], {"mode": "linear"}),
    "Resize": (10, [numbers(1, 1, 4, 4), np.array([1, 1, 1.5, 2.5], F32)], {"mode": "nearest"}),
    "Pad": (18, [numbers(2, 3, 4), np.array([0, 0, -1, 0, 0, 1])], {}),
    "ConvTranspose": (18, [numbers(1, 4, 5, 5), numbers(4, 3, 3, 3)], {"group": 2, "strides": [2, 2]}),
    "Mean": (18, [numbers(3), numbers(2, 1)], {}),
    "GlobalLpPool": (18, [numbers(1, 2, 3, 3)], {"p": 1}),
}
"""What it cannot compute."""


@pytest.mark.parametrize("operator", [*MISTAKEN, *MISSING])
def test_what_the_reference_does_not_have_right_is_computed_by_the_runtime(operator: str) -> None:
    opset, inputs, attributes = (MISTAKEN | MISSING)[operator]
    constants = {f"i{index}": array for index, array in enumerate(inputs)}
    nodes = [
        helper.make_node(operator, [*constants], ["k"], name="k", **attributes),
        helper.make_node("ReduceMax", ["x"], ["m"], axes=[1], keepdims=0)
        if opset < 18
        else helper.make_node("ReduceMax", ["x", "one"], ["m"], keepdims=0),
        helper.make_node("Reshape", ["k", "flat"], ["f"]),
        helper.make_node("Reshape", ["m", "tall"], ["c"]),
        helper.make_node("Mul", ["c", "f"], ["y"]),
    ]
    constants |= {"one": np.array([1]), "flat": np.array([1, -1]), "tall": np.array([-1, 1])}
    model = make(nodes, {"x": (OPEN, 2)}, constants, opset=opset)
    feeds = {"x": numbers(3, 2)}
    np.testing.assert_allclose(run(read_unchecked(model), feeds)[0], truth(model, feeds)[0], rtol=1e-5)


def test_layers_as_large_as_those_of_networks_are_computed() -> None:
    """AlexNet's first linear layer, as a file of ONNX's own has it; what is larger than any is refused."""
    node = helper.make_node("ConstantOfShape", ["s"], ["y"])
    (found,) = evaluate(node, 9, [Known((np.array([4096, 9216]),))], 1)
    assert found.array.shape == (4096, 9216)
    with pytest.raises(LoadError, match="found a constant of 4294967296 numbers"):
        evaluate(node, 9, [Known((np.array([65536, 65536]),))], 1)


def held(*shape: int, computed: bool) -> Program:
    """A constant that two additions read."""
    added = "n" if computed else "k"
    nodes = [
        helper.make_node("Neg", ["k"], ["n"]),
        helper.make_node("Add", ["x", added], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Add", ["b", added], ["y"]),
    ]
    return read_unchecked(make(nodes, {"x": (OPEN, 4, 3)}, {"k": numbers(*shape)}))


@pytest.mark.parametrize("computed", [False, True])
def test_what_is_read_again_is_held_once(computed: bool) -> None:
    assert len(held(4, 3, computed=computed).tensors) == 1


@pytest.mark.parametrize("computed", [False, True])
def test_vectors_are_copied_for_each_that_reads_them(computed: bool) -> None:
    """Exporters merge equal ones, which would couple the channels of layers that have nothing in common."""
    assert len(held(4, 1, computed=computed).tensors) == 2
