"""8 bit files in TensorRT's terms: what they hold, what they compute as written, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from graphcomp.errors import ExportError, ProviderError
from graphcomp.onnx import Timing, quantize_file, requantize
from graphcomp.onnx.quantization.checks import run_all, snr
from graphcomp.onnx.subgraphs import makers_of
from graphcomp.records import Plan
from graphcomp.runtime import TARGETS, find_target, session
from tests.onnx.test_quantization import exported, feeds_of, split_of


def test_the_target_is_one_for_8_bits() -> None:
    assert find_target("tensorrt-int8", eight_bits=True) is TARGETS["tensorrt-int8"]


@pytest.mark.slow
def test_layers_and_additions_read_s8_without_zero_points(tmp_path: Path) -> None:
    path, out, again = exported(tmp_path), tmp_path / "int8.onnx", tmp_path / "again.onnx"
    made, choice = quantize_file(path, out, split_of(64), timing=None, kernels="tensorrt")
    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    makers, stored = makers_of(model), {i.name: i for i in model.graph.initializer}
    rounding = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in rounding:
        zero = stored[node.input[2]]
        assert zero.data_type == TensorProto.INT8 and not numpy_helper.to_array(zero).any()
    layers = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm", "Add")]
    assert sorted({n.op_type for n in layers}) == ["Add", "Conv", "Gemm"]
    for node in layers:
        for name in node.input[:2]:
            before = makers[name]
            assert before.op_type == "DequantizeLinear", node.name
            assert makers[before.input[0]].op_type == "QuantizeLinear", node.name
        if node.op_type != "Add":
            assert stored[node.input[2]].data_type == TensorProto.FLOAT
            scale = stored[makers[node.input[1]].input[1]]
            assert list(scale.dims) == [len(numpy_helper.to_array(stored[node.input[2]]))]
    feeds = feeds_of(model, split_of(16, seed=1))
    expected = [y[0] for y in run_all(path.read_bytes(), feeds)]
    assert snr(expected, [y[0] for y in run_all(out.read_bytes(), feeds, plain=True)]) > 35
    assert made.kernels == "tensorrt" and made.operators == {} and made.saturating == []
    assert all(layer.steps is None for layer in made.layers) and made.snr_db > 35
    decisions, bulk = choice.plan()
    requantize(path, again, Plan(name="quantize", decisions=decisions, bulk=bulk))
    assert again.read_bytes() == out.read_bytes()
    assert np.isfinite(made.snr_db)


@pytest.mark.parametrize("providers", [("cpu",), ("tensorrt", "cpu")])
def test_it_is_not_raced_where_it_is_not_for(providers: tuple[str, ...], tmp_path: Path) -> None:
    timing = Timing(providers=providers)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"found a race in .*cpu of a file in the terms of tensorrt"):
        quantize_file(
            exported(tmp_path), tmp_path / "x.onnx", split_of(32), timing=timing, kernels="tensorrt"
        )


@pytest.mark.slow
def test_tensorrt_is_told_that_there_are_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a session that does not open here: it has seen its options by then."""
    path, out = exported(tmp_path), tmp_path / "int8.onnx"
    quantize_file(path, out, split_of(64), timing=None, kernels="tensorrt")
    seen = []

    def create(ort: Any, model: Any, provider: str, threads: int, options: Any, **others: Any) -> Any:
        seen.append(options["trt_int8_enable"])
        raise RuntimeError("no GPU")

    monkeypatch.setattr(session, "_create", create)
    for file in (path, out):
        with pytest.raises(ProviderError):
            session.open_session(file, "tensorrt")
    assert seen == ["0", "1"]
