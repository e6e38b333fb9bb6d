"""Positions on an axis of any size: counted from either end, and cut off where the axis ends."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, helper

from graphcomp.errors import LoadError
from graphcomp.ir import Program
from graphcomp.onnx import export_onnx, read_onnx
from graphcomp.onnx.reading.file import OnnxSource
from graphcomp.onnx.reading.ports import BATCHES, Case, examples, inputs_of, opened
from graphcomp.onnx.reading.reader import Attempt, build
from tests.onnx.onnx_files import OPEN, make, run, save, truth

SIZE = 8
"""Of the example; others are larger by 32."""


def read_open(model: ModelProto) -> Program:
    """With the batch and the last axis open."""
    inputs = inputs_of(model)
    sizes = examples(inputs, {"": (1, 3, SIZE)})
    cases = [Case(b, sizes) for b in BATCHES] + [Case(1, {**sizes, **opened(inputs, sizes)})]
    source = OnnxSource(Path("model.onnx"), model, model.opset_import[0].version)
    return build(source, inputs, Attempt(tuple(cases), None, True, True), None)


def assert_equal(nodes: list[NodeProto], constants: Mapping[str, np.ndarray], opset: int = 18) -> None:
    model = make(nodes, {"x": (OPEN, 3, "W")}, constants, opset=opset)
    program = read_open(model)
    for size in (SIZE, 9, 13, 40, 131):
        feeds = {"x": np.random.default_rng(size).normal(size=(2, 3, size)).astype(np.float32)}
        np.testing.assert_array_equal(run(program, feeds)[0], truth(model, feeds)[0])


BOUNDS = [
    (0, 100, 1), (-100, 1 << 40, 1), (-3, 1 << 40, 1), (0, -3, 1), (2, 6, 1), (-5, -1, 1), (100, 200, 1),
    (-100, 50, 3), (1, 1 << 40, 2), (-1, -(1 << 40), -1), (50, 0, -1), (-2, 1, -2), (6, -100, -1),
    (100, -60, -3), (5, 2, 1), (1, 5, -1),
]  # fmt: skip


@pytest.mark.parametrize(("start", "end", "step"), BOUNDS)
def test_slices_are_what_they_are_at_any_size(start: int, end: int, step: int) -> None:
    names = ("starts", "ends", "axes", "steps")
    constants = {n: np.array([v]) for n, v in zip(names, (start, end, -1, step), strict=True)}
    assert_equal([helper.make_node("Slice", ["x", *names], ["y"])], constants)


@pytest.mark.parametrize("positions", [-1, -2, [-1], [-3, -2, -1], [-1, -3], [[-1, -2], [-4, -4]], [0, 5, 2]])
def test_gathers_from_either_end(positions: Any) -> None:
    constants = {"i": np.array(positions, np.int64)}
    assert_equal([helper.make_node("Gather", ["x", "i"], ["y"], axis=2)], constants)


def test_gathers_at_a_size_less_something() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=2), helper.make_node("Sub", ["n", "back"], ["i"]),
        helper.make_node("Gather", ["x", "i"], ["y"], axis=2),
    ]  # fmt: skip
    assert_equal(nodes, {"back": np.array([3, 1])})


def test_gathers_from_both_ends_are_refused() -> None:
    node = helper.make_node("Gather", ["x", "i"], ["y"], axis=2)
    model = make([node], {"x": (OPEN, 3, "W")}, {"i": np.array([0, -1])})
    with pytest.raises(LoadError, match="found positions from both ends of an open axis"):
        read_open(model)


def halved(up: bool) -> ModelProto:
    """Half of the axis, rounded up or down, and as many zeros behind it."""
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=2), helper.make_node("Add", ["n", "more"], ["m"]),
        helper.make_node("Div", ["m", "two"], ["half"]),
        helper.make_node("Slice", ["x", "zero", "half", "two"], ["y"]),
    ]  # fmt: skip
    constants = {"more": np.array([int(up)]), "two": np.array([2]), "zero": np.array([0])}
    return make(nodes, {"x": (OPEN, 3, "W")}, constants)


def test_a_size_that_is_rounded_otherwise_is_no_part_of_the_input(tmp_path: Path) -> None:
    """At 8 and 40 both are half of it; at 15 they are not."""
    down = read_onnx(save(halved(False), tmp_path), {"": (1, 3, SIZE)})
    assert run(down, {"x": np.zeros((1, 3, 15), np.float32)})[0].shape == (1, 3, 7)
    up = read_onnx(save(halved(True), tmp_path), {"": (1, 3, SIZE)})
    assert 2 not in up.interface.inputs[0].axes
    assert any("takes inputs of the example's size only" in said for said in up.interface.remarks)


@pytest.mark.parametrize("fails", ["squeeze", "concatenation"])
def test_an_axis_that_is_open_up_to_a_size(fails: str, tmp_path: Path) -> None:
    """Text lines: any height that pooling makes one of is taken, and the width is free."""
    last = [helper.make_node("Squeeze", ["p", "two"], ["y"])]
    if fails == "concatenation":
        mean = helper.make_node("ReduceMean", ["c", "two"], ["m"])
        last = [mean, helper.make_node("Concat", ["p", "m"], ["y"], axis=1)]
    model = make(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("MaxPool", ["c"], ["p"], kernel_shape=[48, 1], strides=[48, 1]),
            *last,
        ],
        {"x": ("n", 1, "height", "width")},
        {"w": np.random.default_rng(0).normal(size=(4, 1, 3, 3)).astype(np.float32), "two": np.array([2])},
    )
    program = read_onnx(save(model, tmp_path), {"x": (1, 1, 48, 40)})
    assert program.interface.inputs[0].axes == {0: "n", 2: "height", 3: "width"}
    export = export_onnx(program, tmp_path / "again.onnx")
    assert export.fallback is None
    assert any("1x80x104" in place for place in export.parity)
    assert not any("x112x" in place for place in export.parity)


@pytest.mark.parametrize("operator", ["GatherElements", "ScatterElements"])
def test_computed_positions_count_from_the_end_of_the_axis(operator: str) -> None:
    """An argmax less the size of the axis is the same position."""
    given = ["x", "i"] if operator == "GatherElements" else ["x", "i", "v"]
    nodes = [
        helper.make_node("ArgMax", ["x"], ["at"], axis=2), helper.make_node("Shape", ["x"], ["n"], start=2),
        helper.make_node("Sub", ["at", "n"], ["i"]), helper.make_node("ReduceMin", ["x", "two"], ["v"]),
        helper.make_node(operator, given, ["y"], axis=2),
    ]  # fmt: skip
    assert_equal(nodes, {"two": np.array([2])})
