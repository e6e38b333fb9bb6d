"""Every row that reads an operator, against ONNX Runtime or ONNX's own reference."""

import numpy as np
import onnx
import pytest

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


def test_every_row_has_an_example() -> None:
    assert READS.keys() - {e.operator for e in EXAMPLES} == {"Shape", "Size"}
