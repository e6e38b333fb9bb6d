"""Every row that reads an operator, against ONNX Runtime or ONNX's own reference."""

from collections.abc import Sequence

import numpy as np
import onnx
import pytest

from graphcomp.errors import LoadError
from graphcomp.onnx.rows import READS
from tests.onnx.onnx_files import OPEN, make, read_unchecked, run, truth
from tests.onnx.read_examples import EXAMPLES, Example


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_a_row_computes_what_its_operator_does(example: Example) -> None:
    model = example.model()
    program = read_unchecked(model)
    for batch in (2, 3):
        feeds = example.feeds(batch)
        for found, expected in zip(run(program, feeds), truth(model, feeds), strict=True):
            assert found.shape == expected.shape
            assert found.dtype == expected.dtype or expected.dtype.kind == found.dtype.kind == "f"
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_sizes_become_sizes_of_inputs() -> None:
    """Shape and Size are numbers while the file is read; what follows from the batch follows it."""
    nodes = [
        onnx.helper.make_node("Shape", ["x"], ["s"]),
        onnx.helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
        onnx.helper.make_node("Expand", ["row", "s"], ["e"]),
        onnx.helper.make_node("Size", ["x"], ["all"]),
        onnx.helper.make_node("Cast", ["all"], ["f"], to=1),
        onnx.helper.make_node("Div", ["e", "f"], ["d"]),
        onnx.helper.make_node("Cast", ["n"], ["g"], to=1),
        onnx.helper.make_node("Mul", ["d", "g"], ["m"]),
        onnx.helper.make_node("Add", ["m", "x"], ["y"]),
    ]
    model = make(nodes, {"x": (OPEN, 4)}, {"row": np.arange(4, dtype=np.float32)})
    program = read_unchecked(model)
    for batch in (1, 5, 9):
        feeds = {"x": np.ones((batch, 4), np.float32)}
        np.testing.assert_allclose(run(program, feeds)[0], truth(model, feeds)[0], rtol=1e-5)


def around(node: onnx.NodeProto, constants: dict[str, np.ndarray], opset: int = 18) -> onnx.ModelProto:
    """A node that has the samples on its last axis: `t` and `v` are the inputs with them there."""
    turn = [onnx.helper.make_node("Transpose", [n], [m], perm=[1, 2, 0]) for n, m in ("xt", "uv")]
    nodes = [
        *turn,
        onnx.helper.make_node("Shape", ["t"], ["n"], start=2),
        onnx.helper.make_node("Expand", ["length", "n"], ["lengths"]),
        node,
        onnx.helper.make_node("Transpose", ["z"], ["y"], perm=[2, 0, 1]),
    ]
    inputs = {"x": (OPEN, 4, 3), "u": (OPEN, 2, 3)}
    return make(nodes, inputs, {"length": np.array([4]), **constants}, opset=opset)


PLACES = {
    "rows": np.array([[1], [2]]),
    "apart": np.array([[0], [2]]),
    "backwards": np.array([[3], [0]]),
    "from the end": np.array([[-1], [1]]),
    "a box": np.array([[[1, 0], [1, 1], [1, 2]], [[2, 0], [2, 1], [2, 2]]]),
    "a box with gaps": np.array([[[0, 2], [0, 0], [0, 1]], [[2, 2], [2, 0], [2, 1]]]),
}


@pytest.mark.parametrize("how", ["none", "add", "mul", "max", "min"])
@pytest.mark.parametrize("places", sorted(PLACES))
def test_writes_into_places(places: str, how: str) -> None:
    node = onnx.helper.make_node("ScatterND", ["t", "i", "v"], ["z"], reduction=how)
    assert_equal(around(node, {"i": PLACES[places]}))


def scattered(places: list[list[int]], how: str, last: bool) -> onnx.ModelProto:
    """Numbers for two places of every sample; samples are the last axis, or the first coordinate."""
    node = onnx.helper.make_node
    if last:
        model = around(node("ScatterND", ["t", "i", "w"], ["z"], reduction=how), {"i": np.array(places)})
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.int64(1), "first"))
        model.graph.node.insert(4, node("Gather", ["v", "first"], ["w"], axis=1))
        return model
    nodes = [
        node("Shape", ["x"], ["n"], start=0, end=1), node("Squeeze", ["n"], ["count"]),
        node("Range", ["zero", "count", "first"], ["r"]), node("Reshape", ["r", "column"], ["samples"]),
        node("Concat", ["n", "two"], ["all"], axis=0), node("Expand", ["samples", "all"], ["s"]),
        node("Concat", ["n", "shape"], ["whole"], axis=0), node("Expand", ["places", "whole"], ["p"]),
        node("Concat", ["s", "p"], ["i"], axis=2), node("Gather", ["u", "first"], ["w"], axis=2),
        node("ScatterND", ["x", "i", "w"], ["y"], reduction=how),
    ]  # fmt: skip
    constants = {
        "zero": np.int64(0), "first": np.int64(1), "column": np.array([-1, 1, 1]), "two": np.array([2, 1]),
        "shape": np.array([2, 2]), "places": np.array([places]),
    }  # fmt: skip
    return make(nodes, {"x": (OPEN, 4, 3), "u": (OPEN, 2, 3)}, constants)


@pytest.mark.parametrize("how", ["none", "add", "mul"])
@pytest.mark.parametrize("places", [[[0, 0], [2, 1]], [[-1, 2], [1, -1]]], ids=["down", "from the end"])
@pytest.mark.parametrize("last", [True, False], ids=["samples last", "samples first"])
def test_writes_into_places_that_are_no_box(places: list[list[int]], how: str, last: bool) -> None:
    assert_equal(scattered(places, how, last))


def test_places_that_are_written_twice_are_refused() -> None:
    with pytest.raises(LoadError, match="found a place that is written twice, expected each once"):
        read_unchecked(scattered([[2, 1], [2, -2]], "add", True))


@pytest.mark.parametrize(
    "places", [[[[0], [3]]], [[[2, 1], [-1, 0]], [[0, 0], [2, -1]]]], ids=["one axis", "two axes"]
)
def test_reads_from_places(places: list[list[list[int]]]) -> None:
    index = np.array(places)
    node = onnx.helper.make_node("GatherND", ["t", "i"], ["g"])
    model = around(onnx.helper.make_node("Identity", ["g"], ["z"]), {"i": index})
    model.graph.node.insert(4, node)
    if index.shape[-1] == 1:  # which leaves an axis more
        del model.graph.node[-1], model.graph.output[:]
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info("z"))
    assert_equal(model)


@pytest.mark.parametrize("length", [4, 3])
def test_whole_sequences_are_turned_and_shorter_ones_refused(length: int) -> None:
    node = onnx.helper.make_node("ReverseSequence", ["t", "lengths"], ["z"], time_axis=0, batch_axis=1)
    turn = onnx.helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2])
    model = around(node, {"length": np.array([length])})
    model.graph.node[0].CopyFrom(turn)
    model.graph.node[2].CopyFrom(onnx.helper.make_node("Shape", ["t"], ["n"], start=1, end=2))
    model.graph.node[-1].attribute[0].ints[:] = [1, 0, 2]
    if length == 4:
        assert_equal(model)
    else:
        with pytest.raises(LoadError, match="found shorter sequences"):
            read_unchecked(model)


def assert_equal(model: onnx.ModelProto) -> None:
    program = read_unchecked(model)
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim][1:] for i in model.graph.input}
    for batch in (2, 3):
        rng = np.random.default_rng(batch)
        feeds = {n: rng.normal(size=(batch, *s)).astype(np.float32) for n, s in shapes.items()}
        for found, expected in zip(run(program, feeds), truth(model, feeds), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("operator", ["Dropout", "MaxPool"])
def test_outputs_that_nothing_reads_are_none(operator: str) -> None:
    """Files name them all the same; what reads one is refused, not given something else."""
    said = {"kernel_shape": [2, 2]} if operator == "MaxPool" else {}
    node = onnx.helper.make_node(operator, ["x"], ["y", "m"], **said)
    model = make([node], {"x": (OPEN, 4, 6, 5)}, opset=11)
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 4, 6, 5)).astype(np.float32)}
    np.testing.assert_allclose(run(read_unchecked(model), feeds)[0], truth(model, feeds)[0], rtol=1e-5)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("m"))
    with pytest.raises(LoadError, match=r"found output 1, which something reads"):
        read_unchecked(model)


@pytest.mark.parametrize("others", ["abcd", ["", "", "", ""]], ids=["named", "left out"])
def test_normalisation_by_the_batch_is_refused(others: Sequence[str]) -> None:
    """Sets below 14 ask for it by having all outputs; without names ONNX Runtime crashes on them."""
    node = onnx.helper.make_node("BatchNormalization", ["x", *"sbmv"], ["y", *others])
    constants = {n: np.ones(4, np.float32) for n in "sbmv"}
    with pytest.raises(LoadError, match=r"found statistics of the batch .* in eval mode"):
        read_unchecked(make([node], {"x": (OPEN, 4, 6, 5)}, constants, opset=9))


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"softcap": 2.0}, "softcap"),
        ({"is_causal": 1, "mask": True}, "is_causal beside a mask"),
        ({"q_num_heads": 3, "kv_num_heads": 3}, r"\(3, 3\) heads"),
        ({"past": True, "q_num_heads": 2, "kv_num_heads": 2}, "input 4"),
    ],
    ids=["softcap", "causal and masked", "heads", "past"],
)
def test_attention_that_torch_does_not_compute_is_refused(said: dict[str, float], found: str) -> None:
    said = dict(said)
    shape = (OPEN, 5, 8) if "q_num_heads" in said else (OPEN, 2, 5, 3)
    mask, past = "m" * said.pop("mask", False), ["p", "p"] * said.pop("past", False)
    node = onnx.helper.make_node("Attention", ["x", "x", "x", mask, *past], ["y"], **said)
    constants = {"m": np.zeros((5, 5), np.float32), "p": np.zeros((1, 2, 0, 4), np.float32)}
    with pytest.raises(LoadError, match=rf"Attention .*found {found}"):
        read_unchecked(make([node], {"x": shape}, constants, opset=23))


def test_every_row_has_an_example() -> None:
    assert READS.keys() - {e.operator for e in EXAMPLES} == {
        "Shape",
        "Size",
        "ReverseSequence",
        "ScatterND",
        "GatherND",
    }
