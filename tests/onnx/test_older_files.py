# ruff: noqa: E501 - a table reads better with one line a form
"""Files as they were written in 2017 to 2019: attributes where inputs are now, weights among the inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from graphcomp.errors import LoadError
from graphcomp.onnx import read_onnx
from tests.onnx.onnx_files import Array, run
from tests.onnx.read_examples import ints, weight

SHAPE = (4, 6, 5)


def old(
    operator: str, opset: int, constants: dict[str, Array], outputs: int = 1, **attributes: Any
) -> ModelProto:
    """A node of an old operator set in a file of IR version 3, which lists weights as inputs, too."""
    names = ["y", *(f"y{i}" for i in range(1, outputs))]
    held = [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", *constants], names, name="n", **attributes)],
        "old",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE]),
         *(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in held)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", *SHAPE])],
        held,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=3)


def normalised(x: Array) -> Array:
    scale, bias, mean, var = (c.reshape(4, 1, 1) for c in NORM.values())
    return (x - mean) / np.sqrt(var + 1e-3) * scale + bias


def wide(x: Array) -> Array:
    return x.repeat(2, axis=2).repeat(3, axis=3)


NORM = {"s": weight(4), "b": weight(4, seed=1), "m": weight(4, seed=2), "v": np.abs(weight(4, seed=3)) + 0.5}
FLAT = lambda x: x.reshape(len(x), -1)  # noqa: E731

FORMS: dict[str, tuple[Callable[[], ModelProto], Callable[[Array], Array]]] = {
    "Unsqueeze at axes": (lambda: old("Unsqueeze", 6, {}, axes=[1, 5]), lambda x: x[:, None, ..., None]),
    "Clip by attributes": (lambda: old("Clip", 6, {}, min=-0.5, max=0.25), lambda x: x.clip(-0.5, 0.25)),
    "Clip, one bound": (lambda: old("Clip", 9, {}, max=0.25), lambda x: x.clip(None, 0.25)),
    "Dropout, a test": (lambda: old("Dropout", 6, {}, is_test=1, ratio=0.3), lambda x: x),
    "Dropout": (lambda: old("Dropout", 7, {}, ratio=0.3), lambda x: x),
    "Pad": (lambda: old("Pad", 6, {}, pads=[0, 0, 1, 2, 0, 0, 0, 1], value=0.5), lambda x: np.pad(x, [(0, 0), (0, 0), (1, 0), (2, 1)], constant_values=0.5)),
    "Slice": (lambda: old("Slice", 7, {}, starts=[1, -3], ends=[3, 9], axes=[1, 3]), lambda x: x[:, 1:3, :, -3:9]),
    "Slice without axes": (lambda: old("Slice", 6, {}, starts=[0, 1], ends=[99, 3]), lambda x: x[:, 1:3]),
    "Split": (lambda: old("Split", 7, {}, 2, axis=1, split=[1, 3]), lambda x: x[:, :1]),
    "Upsample by attribute": (lambda: old("Upsample", 7, {}, scales=[1.0, 1.0, 2.0, 3.0]), wide),
    "Upsample by input": (lambda: old("Upsample", 9, {"z": np.array([1, 1, 2, 3], np.float32)}), wide),
    "BatchNormalization, a test": (lambda: old("BatchNormalization", 6, NORM, is_test=1, epsilon=1e-3), normalised),
    "BatchNormalization, spatial": (lambda: old("BatchNormalization", 7, NORM, spatial=1, epsilon=1e-3), normalised),
    "Reshape by attribute": (lambda: old("Reshape", 4, {}, shape=[0, -1]), FLAT),
    "Reshape by input": (lambda: old("Reshape", 5, {"z": ints(0, -1)}), FLAT),
    "Mul by a number": (lambda: old("Mul", 6, {"c": np.array([2.0], np.float32)}, broadcast=1), lambda x: x * 2),
    "Add of rows": (lambda: old("Add", 7, {"c": weight(5)}), lambda x: x + weight(5)),
    "ReduceSum over axes": (lambda: old("ReduceSum", 7, {}, axes=[2, 3], keepdims=0), lambda x: x.sum((2, 3))),
    "Transpose": (lambda: old("Transpose", 1, {}, perm=[0, 2, 3, 1]), lambda x: x.transpose(0, 2, 3, 1)),
    "Conv": (lambda: old("Conv", 1, {"w": weight(3, 4, 1, 1)}, kernel_shape=[1, 1]), lambda x: np.einsum("nchw,oc->nohw", x, weight(3, 4, 1, 1)[..., 0, 0])),
    "AveragePool": (lambda: old("AveragePool", 6, {}, kernel_shape=[6, 5]), lambda x: x.mean((2, 3), keepdims=True)),
    "Softmax": (lambda: old("Softmax", 6, {}), lambda x: (np.exp(FLAT(x)) / np.exp(FLAT(x)).sum(1, keepdims=True)).reshape(x.shape)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_an_old_form_is_read(form: str, tmp_path: Path) -> None:
    make, expected = FORMS[form]
    x = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    model = make()
    sizes = ["N", *expected(x).shape[1:]]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes))
    onnx.save(model, tmp_path / "model.onnx")
    program = read_onnx(tmp_path / "model.onnx")
    assert [p.name for p in program.interface.inputs] == ["x"]
    converted = model.opset_import[0].version < 7
    assert any("converted to 7" in said for said in program.interface.remarks) == converted
    np.testing.assert_allclose(run(program, {"x": x})[0], expected(x), rtol=1e-4, atol=1e-5)


def test_old_statistics_of_the_batch_are_refused(tmp_path: Path) -> None:
    onnx.save(old("BatchNormalization", 6, NORM, is_test=0), tmp_path / "model.onnx")
    with pytest.raises(LoadError, match="operator set 6"):
        read_onnx(tmp_path / "model.onnx")


def test_what_the_converter_does_not_know_is_refused(tmp_path: Path) -> None:
    onnx.save(old("Pad", 1, {}, paddings=[0, 0, 1, 2, 0, 0, 0, 1]), tmp_path / "model.onnx")
    with pytest.raises(
        LoadError, match=r"model\.onnx: found operator set 1, and .*, expected one of 7 or more"
    ):
        read_onnx(tmp_path / "model.onnx")
