"""What files have in several nodes becomes one, where it is that."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from onnx import NodeProto, helper
from torch import nn

from graphcomp.ir import Program, op_name
from graphcomp.onnx import export_onnx, read_onnx
from tests.onnx.onnx_files import OPEN, make, run, save, truth

F32 = np.float32
node = helper.make_node


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(F32)


def read(
    nodes: Sequence[NodeProto],
    constants: Mapping[str, np.ndarray],
    folder: Path,
    outputs: Sequence[str] = ("y",),
) -> Program:
    """The program, which computes what the file does."""
    model = make(nodes, {"x": (OPEN, 6, 4, 4)}, constants, outputs)
    program = read_onnx(save(model, folder))
    feeds = {"x": numbers(3, 6, 4, 4)}
    for found, expected in zip(run(program, feeds), truth(model, feeds), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    return program


def norms(program: Program) -> list[nn.Module]:
    return list(program.called_modules().values())


NORM = node("InstanceNormalization", ["r", "w", "b"], ["n"], name="norm")
BACK = node("Reshape", ["n", "whole"], ["y"])
GROUPED = [
    node("Reshape", ["x", "groups"], ["r"]), NORM,
    node("Shape", ["x"], ["shape"]), node("Reshape", ["n", "shape"], ["back"]),
]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("behind", ["nothing", "scale", "shift", "both", "turned"])
def test_groups_for_instances_are_a_normalisation_of_groups(behind: str, count: int, tmp_path: Path) -> None:
    constants = {
        "groups": np.array([0, count, -1]), "w": numbers(count), "b": numbers(count) + 1,
        "scale": numbers(6, 1, 1), "shift": numbers(1, 6, 1, 1),
    }  # fmt: skip
    last = {
        "nothing": [node("Relu", ["back"], ["y"])],
        "scale": [node("Mul", ["back", "scale"], ["y"])],
        "shift": [node("Add", ["shift", "back"], ["y"])],
        "both": [node("Mul", ["back", "scale"], ["m"]), node("Add", ["m", "shift"], ["y"])],
        "turned": [node("Add", ["back", "shift"], ["a"]), node("Mul", ["a", "scale"], ["y"])],
    }[behind]
    program = read([*GROUPED, *last], constants, tmp_path)
    (layer,) = norms(program)
    assert isinstance(layer, nn.GroupNorm) and (layer.num_groups, layer.num_channels) == (count, 6)
    left = [op_name(program, n) for n in program.graph.nodes if n.op == "call_function"]
    assert left == {"nothing": ["relu"], "turned": ["mul"]}.get(behind, [])
    export_onnx(program, tmp_path / "again.onnx")
    assert isinstance(norms(read_onnx(tmp_path / "again.onnx"))[0], nn.GroupNorm)


OTHERS: dict[str, list[NodeProto]] = {
    "halves of samples": [node("Reshape", ["x", "apart"], ["r"]), NORM, BACK],
    "parts of channels": [node("Reshape", ["x", "four"], ["r"]), NORM, BACK],
    "other shape": [*GROUPED[:2], node("Reshape", ["n", "flat"], ["y"])],
    "read twice": [*GROUPED, node("Relu", ["back"], ["y"]), node("Relu", ["n"], ["z"])],
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_other_reshapes_are_left(other: str, tmp_path: Path) -> None:
    groups = 4 if other == "parts of channels" else 2
    constants = {
        "groups": np.array([0, 2, -1]), "apart": np.array([-1, 2, 24]), "four": np.array([0, 4, -1]),
        "whole": np.array([-1, 6, 4, 4]), "flat": np.array([0, 4, 6, 4]), "w": numbers(groups),
        "b": numbers(groups),
    }  # fmt: skip
    program = read(OTHERS[other], constants, tmp_path, ["y", "z"] if other == "read twice" else ["y"])
    assert not any(isinstance(m, nn.GroupNorm) for m in norms(program))


def test_a_scale_that_is_no_number_a_channel_stays(tmp_path: Path) -> None:
    constants = {
        "groups": np.array([0, 2, -1]), "w": numbers(2), "b": numbers(2), "plane": numbers(1, 6, 4, 1),
    }  # fmt: skip
    program = read([*GROUPED, node("Mul", ["back", "plane"], ["y"])], constants, tmp_path)
    assert [op_name(program, n) for n in program.graph.nodes if n.op == "call_function"] == ["mul"]


def test_what_is_expanded_to_the_other_operand_is_broadcast(tmp_path: Path) -> None:
    """But not where the other operand is smaller, or the same, or where the expansion is read as it is."""
    nodes = [
        node("ReduceL2", ["x", "one"], ["norm"], keepdims=1), node("Shape", ["x"], ["shape"]),
        node("Expand", ["norm", "shape"], ["e"]), node("Div", ["x", "e"], ["y"]),
        node("Add", ["norm", "e"], ["smaller"]), node("Mul", ["e", "e"], ["itself"]),
        node("Concat", ["x", "e"], ["beside"], axis=1),
    ]  # fmt: skip
    constants = {"one": np.array([1])}
    program = read(nodes, constants, tmp_path, ["y", "smaller", "itself", "beside"])
    (expanded,) = (n for n in program.graph.nodes if op_name(program, n) == "expand")
    assert sorted(op_name(program, n) for n in expanded.users) == ["add", "cat", "mul"]
    program = read(nodes[:4], constants, tmp_path)
    assert not any(op_name(program, n) == "expand" for n in program.graph.nodes)
