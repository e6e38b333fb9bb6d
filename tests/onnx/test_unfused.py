"""Valid files that a fusion of ONNX Runtime breaks, by adding the pads of a Pad to those of a pool."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, helper

from graphcomp.onnx import read_onnx
from graphcomp.runtime import run_errors
from tests.onnx.onnx_files import OPEN, make, reference, run, save


def padded(pads: int) -> ModelProto:
    nodes = [
        helper.make_node("Pad", ["x", "p"], ["z"]),
        helper.make_node("AveragePool", ["z"], ["y"], kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
    ]
    return make(nodes, {"x": (OPEN, 2, 6, 6)}, {"p": np.array([0, 0, pads, pads, 0, 0, pads, pads])})


def test_such_a_file_is_compared_without_fusions_and_says_so(tmp_path: Path) -> None:
    broken, sound = padded(3), padded(1)
    with pytest.raises(run_errors()):
        onnxruntime.InferenceSession(str(save(broken, tmp_path)), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(3, 2, 6, 6)).astype(np.float32)
    for model, said in ((broken, True), (sound, False)):
        program = read_onnx(save(model, tmp_path))
        assert any("without fusions" in remark for remark in program.interface.remarks) == said
        np.testing.assert_allclose(
            run(program, {"x": x})[0], reference(model, {"x": x})[0], rtol=1e-5, atol=1e-6
        )
