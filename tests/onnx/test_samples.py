"""Files that were written for one sample: which are read for any number, and what works on the others."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.helper import make_node as node

import graphcomp
from graphcomp.channels import analyse
from graphcomp.data import load_data
from graphcomp.errors import PassError
from graphcomp.ir import Program
from graphcomp.measure import evaluate
from graphcomp.measure.calibrate import batch_size
from graphcomp.measure.cost import params_trainable
from graphcomp.onnx import export_onnx, read_onnx
from graphcomp.train import TrainOptions, check_training
from tests.onnx.onnx_files import make, run
from tests.onnx.onnx_files import save as write
from tests.onnx.read_examples import ints, weight

F32 = np.float32


def recogniser(computed: bool) -> onnx.ModelProto:
    """Columns of an image as a sequence: time in front, samples in the second axis, as in many OCR networks.

    The layer behind reads all as rows of a matrix, whose shape the file computes, or says for one sample.
    """
    after = [
        node("Shape", ["t"], ["shape"]),
        node("Gather", ["shape", "zero"], ["time"], axis=0),
        node("Gather", ["shape", "one"], ["batch"], axis=0),
        node("Mul", ["time", "batch"], ["rows"]),
        node("Concat", ["rows", "features"], ["matrix"], axis=0),
        node("Concat", ["time", "batch", "classes"], ["sequence"], axis=0),
    ]
    nodes = [
        node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["a"]),
        node("Transpose", ["a"], ["t"], perm=[3, 0, 1, 2]),
        *(after if computed else []),
        node("Reshape", ["t", "matrix"], ["m"]),
        node("Gemm", ["m", "v"], ["g"], name="classify", transB=1),
        node("Reshape", ["g", "sequence"], ["y"]),
    ]
    constants: dict[str, Any] = {"w": weight(8, 1, 3, 3), "v": weight(5, 8 * 4)}
    if computed:
        constants |= {"zero": ints(0), "one": ints(1), "features": ints(32), "classes": ints(5)}
    else:
        constants |= {"matrix": ints(-1, 32), "sequence": ints(-1, 1, 5)}
    return make(nodes, {"x": (1, 1, 4, "width")}, constants)


def test_shapes_that_follow_the_batch_are_the_files_own_word(tmp_path: Path) -> None:
    """What is written for one sample computes the shape of any number of them: nothing is to be guessed."""
    program = read_onnx(write(recogniser(computed=True), tmp_path), {"x": (1, 1, 4, 12)})
    assert [p.axes for p in program.interface.inputs] == [{0: "batch", 3: "width"}]
    assert not program.interface.one_at_a_time
    x = np.random.default_rng(0).normal(size=(3, 1, 4, 20)).astype(F32)
    (together,) = run(program, {"x": x})
    alone = np.concatenate([run(program, {"x": x[i : i + 1]})[0] for i in range(3)], axis=1)
    assert together.shape == (20, 3, 5)
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert sum(len(g.channels) for g in analyse(program).removable) == 8


@pytest.fixture
def alone(tmp_path: Path) -> Program:
    """Of a file that cannot be freed: samples lie behind time in an axis of both."""
    return read_onnx(write(recogniser(computed=False), tmp_path), {"x": (1, 1, 4, 12)})


def test_what_takes_one_sample_is_compressed_on_data(alone: Program, tmp_path: Path) -> None:
    """One by one: batches of what data there is would not run, or mix samples."""
    assert alone.interface.one_at_a_time
    assert batch_size(alone) == 1
    data = load_data("random", input_shape=(1, 4, 12), seed=0)
    for passes in ("l1{ratio=0.5, multiple=1}", "apoz{ratio=0.5, multiple=1}, refit"):
        small = graphcomp.compile(alone, passes, data=data).program
        assert params_trainable(small) < params_trainable(alone)
        export_onnx(small, tmp_path / "small.onnx")
    assert evaluate.drift(alone, alone, [(torch.randn(5, 1, 4, 12),)]).relative_l2 == 0


def test_what_takes_one_sample_is_not_trained(alone: Program) -> None:
    data = load_data("random", input_shape=(1, 4, 12), seed=0)
    with pytest.raises(PassError, match=r"takes one sample at a time.*refit"):
        check_training(alone, data.train, TrainOptions())
