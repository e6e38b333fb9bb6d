"""Inputs that are no samples: numbers that are settled, and states whose samples are not in front."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from graphcomp.errors import LoadError
from graphcomp.onnx import export_onnx, read_onnx
from tests.onnx.onnx_files import OPEN, make, run, save, truth
from tests.onnx.read_examples import weight

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def scaled(shape: tuple[int, ...] = (), kind: int = TensorProto.FLOAT) -> ModelProto:
    """x times an input, and its rate as a number that decides which weight is used."""
    return make(
        [
            helper.make_node("Cast", ["k:0"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["x", "f"], ["y"]),
        ],
        {"x": (OPEN, 4), "k:0": shape},
        kinds={"k:0": kind},
    )


@pytest.mark.parametrize(
    ("shape", "kind", "value", "expected"),
    [
        ((), TensorProto.FLOAT, 2.5, 2.5),
        ((), TensorProto.INT64, 16000, 16000),
        ((), TensorProto.BOOL, True, 1),
        ((1,), TensorProto.INT32, [3], 3),
        ((4,), TensorProto.FLOAT, [1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4]),
        ((4,), TensorProto.FLOAT, 0.5, 0.5),
    ],
)
def test_a_number_is_settled(shape: Any, kind: int, value: Any, expected: Any, tmp_path: Path) -> None:
    program = read_onnx(save(scaled(shape, kind), tmp_path), inputs={"k:0": value})
    assert [port.name for port in program.interface.inputs] == ["x"]
    assert program.interface.arguments == {"k:0": tuple(value) if isinstance(value, list) else value}
    assert f"input 'k:0' is {value} once and for all" in program.interface.remarks
    np.testing.assert_allclose(run(program, {"x": X})[0], X * np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({}, r"input 'k:0': found one number for all samples, .* --input k:0=VALUE"),
        ({"k:0": 2.5}, "--input k:0: found 2.5, expected a number"),
        ({"k:0": "fast"}, "--input k:0: found 'fast', expected a number"),
        ({"k:0": [1, 2]}, r"--input k:0: found \[1, 2\], expected a number"),
        ({"rate": 1}, "--input: found 'rate', expected one of x, k:0"),
    ],
)
def test_what_is_no_number_of_it_is_refused(inputs: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=match):
        read_onnx(save(scaled((), TensorProto.INT64), tmp_path), inputs=inputs)


def test_a_number_chooses_a_branch(tmp_path: Path) -> None:
    """As a voice detector for two sampling rates has it."""

    def branch(factor: float) -> onnx.GraphProto:
        held = onnx.numpy_helper.from_array(np.array(factor, np.float32), f"c{factor}")
        node = helper.make_node("Mul", ["x", f"c{factor}"], [f"y{factor}"])
        out = helper.make_tensor_value_info(f"y{factor}", TensorProto.FLOAT, None)
        return helper.make_graph([node], "branch", [], [out], [held])

    nodes = [
        helper.make_node("Equal", ["sr", "wide"], ["is"]),
        helper.make_node("If", ["is"], ["y"], then_branch=branch(2.0), else_branch=branch(3.0)),
    ]
    model = make(
        nodes, {"x": (OPEN, 4), "sr": ()}, {"wide": np.array(16000)}, kinds={"sr": TensorProto.INT64}
    )
    for rate, factor in ((16000, 2), (8000, 3)):
        program = read_onnx(save(model, tmp_path), inputs={"sr": rate})
        np.testing.assert_allclose(run(program, {"x": X})[0], X * factor)


def recurrent(batch: int | str, state: tuple[int | str, ...]) -> ModelProto:
    """A step of a GRU; its state has samples in the middle, as ONNX has it."""
    nodes = [
        helper.make_node("Unsqueeze", ["x", "front"], ["t"]),
        helper.make_node(
            "GRU", ["t", "w", "r", "", "", "h"], ["", "hn"], hidden_size=3, linear_before_reset=1
        ),
        helper.make_node("Identity", ["hn"], ["z"]),
        helper.make_node("Squeeze", ["hn", "front"], ["y"]),
    ]
    constants = {"front": np.array([0]), "w": weight(1, 9, 4), "r": weight(1, 9, 3)}
    return make(nodes, {"x": (batch, 4), "h": state}, constants, outputs=("y", "z"))


@pytest.mark.parametrize(
    ("batch", "state"), [("N", (1, "N", 3)), ("", (1, "", 3)), (2, (1, 2, 3))], ids=["named", "open", "fixed"]
)
def test_samples_that_are_not_in_front_are_turned(batch: Any, state: Any, tmp_path: Path) -> None:
    model = recurrent(batch, state)
    program = read_onnx(save(model, tmp_path), {"h": [1, 1, 3]} if batch == "" else None)
    assert "input 'h' has its samples along axis 1 in the file, here in front" in program.interface.remarks
    count = 2 if batch == 2 else 5
    x = np.random.default_rng(1).normal(size=(count, 4)).astype(np.float32)
    h = np.random.default_rng(2).normal(size=(1, count, 3)).astype(np.float32)
    expected = truth(model, {"x": x, "h": h})
    for found, other in zip(run(program, {"x": x, "h": h.swapaxes(0, 1)}), expected, strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-4, atol=1e-6)
    export_onnx(program, tmp_path / "again.onnx")
    again = read_onnx(tmp_path / "again.onnx")
    assert [tuple(t.shape) for t in again.example_inputs] == [(1, 4), (1, 1, 3)]


def test_a_guess_that_mixes_samples_is_refused(tmp_path: Path) -> None:
    """The open axis of the second input is no batch: its numbers are all read by every sample."""
    nodes = [helper.make_node("ReduceMax", ["h"], ["m"]), helper.make_node("Mul", ["x", "m"], ["y"])]
    program = read_onnx(save(make(nodes, {"x": ("N", 4), "h": (2, "N")}), tmp_path))
    assert program.interface.one_at_a_time


def test_a_file_of_one_sample_that_looks_at_the_first_stays_at_one(tmp_path: Path) -> None:
    """As frames of one recording are cut out: of two samples together only the first would be read."""
    nodes = [
        helper.make_node("Slice", ["x", "zero", "one", "zero"], ["first"]),
        helper.make_node("Exp", ["first"], ["y"]),
    ]
    model = make(nodes, {"x": (1, 4)}, {"zero": np.array([0]), "one": np.array([1])})
    program = read_onnx(save(model, tmp_path))
    assert program.interface.one_at_a_time
