"""If nodes whose condition depends on data: both branches, chosen from by sample, or refused by name."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from graphcomp.errors import LoadError
from graphcomp.onnx import read_onnx
from tests.onnx.onnx_files import make, run, save, truth


def branch(name: str, operator: str, shape: list[int | str]) -> onnx.GraphProto:
    """What an operator makes of the outer x."""
    nodes = [helper.make_node(operator, ["x"], [name], name=name)]
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)])


def model(axes: list[int] | None, other: onnx.GraphProto, batch: int | str = 1) -> ModelProto:
    """exp(x) or another thing, as the mean over these axes is positive or not."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "a"] if axes else ["x"], ["m"], keepdims=1 if axes else 0),
        helper.make_node("Greater", ["m", "zero"], ["c"]),
        helper.make_node(
            "If", ["c"], ["y"], name="gate", then_branch=branch("p", "Exp", [1, 4]), else_branch=other
        ),
    ]
    constants = {"zero": np.array(0, np.float32)} | ({"a": np.array(axes)} if axes else {})
    return make(nodes, {"x": (batch, 4)}, constants)


def test_branches_are_chosen_by_sample(tmp_path: Path) -> None:
    file = model([1], branch("q", "Neg", [1, 4]))
    program = read_onnx(save(file, tmp_path))
    assert any("If 'gate' depends on data" in remark for remark in program.interface.remarks)
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    expected = [truth(file, {"x": one[None]})[0] for one in x]
    assert len({bool((e > 0).all()) for e in expected}) == 2  # both branches
    np.testing.assert_allclose(run(program, {"x": x})[0], np.concatenate(expected), rtol=1e-5)


def test_one_condition_for_all_samples_leaves_one_at_a_time(tmp_path: Path) -> None:
    program = read_onnx(save(model(None, branch("q", "Neg", ["N", 4]), "N"), tmp_path))
    assert program.interface.one_at_a_time


@pytest.mark.parametrize(("operator", "shape"), [("Shape", [2]), ("Size", []), ("IsNaN", [1, 4])])
def test_branches_that_yield_something_else_are_refused(
    operator: str, shape: list[int | str], tmp_path: Path
) -> None:
    other = branch("q", operator, shape)
    other.output[0].type.tensor_type.elem_type = (
        TensorProto.BOOL if operator == "IsNaN" else TensorProto.INT64
    )
    with pytest.raises(LoadError, match="If 'gate': "):
        read_onnx(save(model([1], other), tmp_path))
