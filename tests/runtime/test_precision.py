"""16 bits on GPUs: refused by name elsewhere, converted rightly, compared as closely as the type allows."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from graphcomp.errors import BenchError
from graphcomp.runtime import benchmark, onnxfile, open_session, probe
from graphcomp.runtime.openvino import require_agreement
from graphcomp.runtime.precision import MOST_APART, in_precision, precision_options
from graphcomp.runtime.session import compare
from tests.onnx.quantised_files import float_file, samples
from tests.runtime.test_bench import has_cuda


def test_only_gpus_have_it() -> None:
    assert precision_options("tensorrt", "fp16") == {"trt_fp16_enable": "1"}
    assert precision_options("tensorrt", "bf16") == {"trt_bf16_enable": "1"}
    assert precision_options("cuda", "fp16") == precision_options("cpu", "fp32") == {}
    for provider, precision in (("cpu", "fp16"), ("openvino", "bf16"), ("cuda", "bf16")):
        with pytest.raises(BenchError, match=f"precision: found '{precision}' with provider '{provider}'"):
            probe(provider, precision=precision)  # type: ignore[arg-type]


def test_a_float16_file_is_the_same_network(tmp_path: Path) -> None:
    """Weights and what is between are float16, inputs and outputs are not; ONNX Runtime runs it anywhere."""
    path = float_file(tmp_path)
    half = in_precision(path, "cuda", "fp16")
    assert isinstance(half, bytes) and in_precision(path, "tensorrt", "fp16") is path
    made = onnx.load_model_from_string(half)
    weights = {t.data_type for t in made.graph.initializer if len(t.dims) > 1}
    assert weights == {TensorProto.FLOAT16}
    kinds = {v.type.tensor_type.elem_type for v in (*made.graph.input, *made.graph.output)}
    assert kinds == {TensorProto.FLOAT}
    feeds = samples()[0]
    (exact,), (found,) = (open_session(m).session.run(None, dict(feeds)) for m in (path, half))
    apart = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    assert 1e-5 < apart < MOST_APART["fp16"]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_as_close_as_the_type_allows(precision: str, tmp_path: Path) -> None:
    most = MOST_APART[precision]  # type: ignore[index]
    expected = [np.ones((2, 8), np.float32)]
    options = {"name": f"cuda in {precision}", "most": most}
    require_agreement("f", [expected[0] * np.float32(1 + 0.9 * most)], expected, **options)  # type: ignore[arg-type]
    with pytest.raises(BenchError, match=f"f: found output 0 of cuda in {precision} .* of its norm away"):
        require_agreement("f", [expected[0] * np.float32(1 + 1.2 * most)], expected, **options)  # type: ignore[arg-type]
    file = onnxfile.read(float_file(tmp_path))
    compare(file, open_session(file.path), samples()[0], precision)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="no working CUDA provider on this machine")
def test_it_really_runs(tmp_path: Path) -> None:
    path = float_file(tmp_path)
    found = benchmark(path, path, provider="cuda", precision="fp16", runs=12, seconds=0.2)
    assert found.precision == "fp16" and found.base.nodes_per_provider.get("CUDAExecutionProvider", 0) > 0
