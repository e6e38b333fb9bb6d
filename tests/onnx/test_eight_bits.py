"""Files in 8 bits are read as the float network that they stand for, by those who ask for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto
from onnx.helper import make_node as node

from graphcomp.errors import LoadError
from graphcomp.onnx import read_onnx
from graphcomp.onnx.quantization.checks import run_all, snr
from graphcomp.onnx.quantization.sessions import plain_session
from graphcomp.onnx.reading.eight_bits import ROUNDING, WEIGHTS
from tests.onnx.onnx_files import OPEN, make
from tests.onnx.quantised_files import FILES, NAMES, float_file, samples


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_layers_have_the_numbers_that_are_stored(name: str, tmp_path: Path) -> None:
    """Against the file's own bytes, dequantised here, and near to the float network."""
    file = FILES[name](tmp_path)
    program = read_onnx(file, rounding=False)
    assert program.interface.remarks == (WEIGHTS, ROUNDING)
    model = onnx.load(file)
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    expected = []
    for n in model.graph.node:
        if n.op_type == "DequantizeLinear" and n.input[0] in stored and stored[n.input[0]].ndim > 1:
            x, scale, zero = (stored[i].astype(np.float64) for i in n.input)
            spread = (-1, *[1] * (x.ndim - 1))
            expected.append(
                (x - zero.reshape(spread if zero.ndim else ())) * scale.reshape(spread if scale.ndim else ())
            )
    layers = [m for m in program.called_modules().values() if hasattr(m, "weight")]
    assert len(layers) == len(expected) == len(NAMES)
    for layer in layers:
        weight = layer.weight.detach().numpy()
        near = [w for w in expected if w.shape in (weight.shape, weight.T.shape)]
        gaps = [min(np.abs(v - weight).max() for v in (w, w.T) if v.shape == weight.shape) for w in near]
        assert min(gaps) <= 1e-6
    y = program(torch.from_numpy(samples()[0]["input"])).detach().numpy()
    (true,) = run_all(float_file(tmp_path).read_bytes(), samples()[:1])[0]
    assert snr([true], [y]) > 20


@pytest.mark.parametrize("name", ["ours", "nameless"])
def test_others_are_told_to_begin_with_the_float_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        LoadError, match="found a quantised network, expected a floating point one; compress the"
    ):
        read_onnx(FILES[name](tmp_path))


def quantised(*nodes: onnx.NodeProto, **constants: Any) -> ModelProto:
    given = {
        "w": np.arange(-6, 6, dtype=np.int8).reshape(4, 3),
        "s": np.float32(0.5),
        "z": np.int8(2),
        "c": np.array([1, 2, 4], np.float32),
        "o": np.array([0, 1, 2], np.int8),
        "zu": np.uint8(7),
    }
    return make(list(nodes), {"x": (OPEN, 4)}, {**given, **constants}, ("y",))


MATMUL = node("MatMul", ["x", "d"], ["y"])
WEIGHT_ONLY: dict[str, Callable[[], ModelProto]] = {
    "by tensor": lambda: quantised(node("DequantizeLinear", ["w", "s", "z"], ["d"]), MATMUL),
    "no zero point": lambda: quantised(node("DequantizeLinear", ["w", "s"], ["d"]), MATMUL),
    "by channel": lambda: quantised(node("DequantizeLinear", ["w", "c", "o"], ["d"], axis=1), MATMUL),
    "from behind": lambda: quantised(node("DequantizeLinear", ["w", "c", "o"], ["d"], axis=-1), MATMUL),
    "read twice": lambda: quantised(
        node("DequantizeLinear", ["w", "s"], ["d"]),
        node("MatMul", ["x", "d"], ["m"]),
        node("ReduceSum", ["d"], ["t"], keepdims=0),
        node("Add", ["m", "t"], ["y"]),
    ),
}


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weights_alone_are_read_by_everybody(name: str, tmp_path: Path) -> None:
    """Nothing is rounded on the way, so the program is the file, as it is written: optimised, it is not."""
    path = tmp_path / "model.onnx"
    onnx.save(WEIGHT_ONLY[name](), path)
    program = read_onnx(path)
    assert program.interface.remarks == (WEIGHTS,)
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    expected = plain_session(onnx.load(path), ["y"])({"x": x})["y"]
    np.testing.assert_allclose(program(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_an_output_that_is_dequantised_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = quantised(
        node("DequantizeLinear", ["w", "s"], ["d"]),
        node("MatMul", ["x", "d"], ["m"]),
        node("QuantizeLinear", ["m", "s", "zu"], ["q"]),
        node("DequantizeLinear", ["q", "s", "zu"], ["y"]),
    )
    onnx.save(model, path)
    program = read_onnx(path, rounding=False)
    x = torch.eye(4)
    weight = np.arange(-6, 6).reshape(4, 3) * 0.5
    assert np.array_equal(program(x).detach().numpy(), weight.astype(np.float32))
    assert [o.name for o in program.interface.outputs] == ["y"]


FLAWS: dict[str, Callable[[], ModelProto]] = {
    "scales of another length": lambda: quantised(
        node("DequantizeLinear", ["w", "c"], ["d"], axis=0), MATMUL
    ),
    "zero points of another length": lambda: quantised(
        node("DequantizeLinear", ["w", "s", "o"], ["d"], axis=0), MATMUL
    ),
    "axis": lambda: quantised(node("DequantizeLinear", ["w", "c"], ["d"], axis=9), MATMUL),
    "blocks": lambda: quantised(node("DequantizeLinear", ["w", "c"], ["d"], axis=0, block_size=2), MATMUL),
    "no scale": lambda: quantised(node("DequantizeLinear", ["w"], ["d"]), MATMUL),
    "huge scale": lambda: quantised(
        node("DequantizeLinear", ["w", "c"], ["d"], axis=1), MATMUL, c=np.ones((1, 3, 1), np.float32)
    ),
    "reads itself": lambda: quantised(
        node("QuantizeLinear", ["d", "s", "zu"], ["q"]),
        node("DequantizeLinear", ["q", "s", "zu"], ["d"]),
        MATMUL,
    ),
    "in a circle": lambda: quantised(
        node("QuantizeLinear", ["d", "s", "zu"], ["q"]),
        node("DequantizeLinear", ["q", "s", "zu"], ["e"]),
        node("QuantizeLinear", ["e", "s", "zu"], ["p"]),
        node("DequantizeLinear", ["p", "s", "zu"], ["d"]),
        MATMUL,
    ),
    "on bytes": lambda: quantised(
        node("QuantizeLinear", ["x", "s", "zu"], ["q"]),
        node("Transpose", ["q"], ["t"]),
        node("DequantizeLinear", ["t", "s", "zu"], ["y"]),
    ),
}


@pytest.mark.parametrize("flaw", FLAWS)
@pytest.mark.parametrize("rounding", [True, False])
def test_what_is_not_valid_is_refused(flaw: str, rounding: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(FLAWS[flaw]().SerializeToString())
    with pytest.raises(LoadError, match="expected"):
        read_onnx(path, rounding=rounding)
