import sys
from functools import partial
from pathlib import Path

import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from graphcomp.base import cache
from graphcomp.errors import BenchError, GraphcompWarning, ProviderError
from graphcomp.runtime import providers, session


def has_cuda() -> bool:
    try:
        session.probe("cuda")
    except ProviderError:
        return False
    return True


needs_gpu = pytest.mark.skipif(not has_cuda(), reason="no working CUDA provider on this machine")
needs_no_gpu = pytest.mark.skipif(has_cuda(), reason="this machine has a working CUDA provider")


class FakeNode:
    def __init__(self, op_type: str, name: str) -> None:
        self.op_type, self.name = op_type, name


class FakePart:
    def __init__(self, ep_name: str, *nodes: FakeNode) -> None:
        self.ep_name, self._nodes = ep_name, nodes

    def get_nodes(self) -> tuple[FakeNode, ...]:
        return self._nodes


class FakeSession:
    """What ONNX Runtime reports when a provider took a part of the model only."""

    def __init__(self, providers: list[str], *parts: FakePart) -> None:
        self._providers, self._parts = providers, parts

    def get_providers(self) -> list[str]:
        return self._providers

    def get_provider_graph_assignment_info(self) -> tuple[FakePart, ...]:
        return self._parts


def test_cpu_session_states_what_it_is() -> None:
    opened = session.open_session(session._probe_model(), "cpu", 2)
    settings = opened.session.get_session_options()
    assert opened.nodes_per_provider == {"CPUExecutionProvider": 1}
    assert opened.session.get_providers() == ["CPUExecutionProvider"]
    assert (settings.intra_op_num_threads, settings.inter_op_num_threads) == (2, 1)
    assert (opened.tf32, opened.memcpy_nodes, opened.device) == (None, 0, "cpu")
    assert opened.load_seconds > 0


def test_probe_runs_on_the_cpu() -> None:
    assert session.probe("cpu").provider == "cpu"


def test_probe_notices_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "wrong",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 4, 4])],
    )
    wrong = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    monkeypatch.setattr(session, "_probe_model", wrong.SerializeToString)
    with pytest.raises(ProviderError, match="convolution is wrong, expected 16"):
        session.probe("cpu")


@needs_no_gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_absent_provider_is_refused_with_what_to_do(
    provider: session.Provider, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ProviderError) as caught:
        session.open_session(session._probe_model(), provider)
    message = str(caught.value)
    assert session.PROVIDERS[provider] in message
    assert "use provider 'cpu'" in message
    assert "graphcomp doctor" in message
    assert capfd.readouterr() == ("", "")  # one clear error, not the runtime's log beside it


def test_provider_that_was_not_built_in_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    error = session._refusal(ort, b"", "model", "cuda", {}, RuntimeError("unknown provider"))
    assert isinstance(error, ProviderError)
    assert "built without it" in str(error)


def test_two_runtimes_at_once_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1.31.0", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(providers, "installed_runtimes", lambda: both)
    with pytest.raises(
        ProviderError, match=r"found onnxruntime 1\.31\.0 and onnxruntime-gpu 1\.31\.1"
    ) as caught:
        session.open_session(session._probe_model(), "cpu")
    assert "pip uninstall onnxruntime onnxruntime-gpu" in str(caught.value)


def test_installed_runtimes_reads_the_metadata(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, top_level, record in (
        ("onnxruntime", "onnxruntime\n", ""),
        ("onnxruntime_gpu", None, "a.py,,\nonnxruntime/__init__.py,sha256=x,1\n"),
        ("onnxruntime_genai", "onnxruntime_genai\n", "onnxruntime/__init__.py,,\n"),
        ("other", None, "my_onnxruntime/__init__.py,,\n"),
        ("bare", None, None),
    ):
        folder = tmp_path / f"{name}-1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name.replace('_', '-')}\nVersion: 1.2\n")
        for file, text in (("top_level.txt", top_level), ("RECORD", record)):
            if text is not None:
                (folder / file).write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert providers.installed_runtimes.__wrapped__() == {"onnxruntime": "1.2", "onnxruntime-gpu": "1.2"}


def test_runtime_that_cannot_tell_placement_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "InferenceSession", type("InferenceSession", (), {}))
    with pytest.raises(ProviderError, match=r"expected 1\.24 or later"):
        session.probe("cpu")


def test_heavy_node_off_the_provider_is_refused() -> None:
    partial = FakeSession(
        ["CUDAExecutionProvider", "CPUExecutionProvider"],
        FakePart("CUDAExecutionProvider", FakeNode("Conv", "a"), FakeNode("Relu", "b")),
        FakePart("CPUExecutionProvider", FakeNode("Gemm", "head"), FakeNode("Shape", "s")),
    )
    with pytest.raises(ProviderError, match="Gemm 'head' on CPUExecutionProvider"):
        session._check_placement(ort, partial, "net.onnx", "cuda")


def test_light_node_off_the_provider_is_counted() -> None:
    partial = FakeSession(
        ["CUDAExecutionProvider", "CPUExecutionProvider"],
        FakePart("CUDAExecutionProvider", FakeNode("Conv", "a"), FakeNode("Relu", "b")),
        FakePart("CPUExecutionProvider", FakeNode("Shape", "s")),
    )
    counted = session._check_placement(ort, partial, "net.onnx", "cuda")
    assert counted == {"CUDAExecutionProvider": 2, "CPUExecutionProvider": 1}


def test_silently_dropped_provider_is_refused() -> None:
    with pytest.raises(ProviderError, match="dropped it without an error"):
        session._check_placement(ort, FakeSession(["CPUExecutionProvider"]), "net.onnx", "cuda")


@pytest.mark.parametrize(("provider", "threads"), [("cpu", 0), ("vulkan", 1)])
def test_options_out_of_range(provider: session.Provider, threads: int) -> None:
    with pytest.raises(BenchError, match="expected"):
        session.open_session(session._probe_model(), provider, threads)


def test_model_that_the_runtime_refuses() -> None:
    with pytest.raises(BenchError, match="cannot load it"):
        session.open_session(b"not a model")


def test_tf32_is_what_options_and_environment_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert providers.allows_tf32("cpu", {}) is None
    assert providers.allows_tf32("cuda", {"use_tf32": "1"}) is True
    assert providers.allows_tf32("cuda", {"use_tf32": "0"}) is False
    assert providers.allows_tf32("tensorrt", {}) is True
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert providers.allows_tf32("cuda", {"use_tf32": "1"}) is False
    assert providers.allows_tf32("tensorrt", {}) is False


SHAPES = {"x": (8, 3, 32, 32)}


def engines(key: str, shapes: dict[str, tuple[int, ...]] = SHAPES) -> str | None:
    """Where TensorRT is told to keep its engines, if anywhere."""
    options = providers.tensorrt_options("tensorrt", shapes, key)
    assert ("trt_engine_cache_path" in options) == (options.get("trt_engine_cache_enable") == "1")
    return options.get("trt_engine_cache_path")


def test_tensorrt_engines_are_in_the_cache_by_all_that_they_are_built_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    place = engines("abc-b8")
    assert place is not None and place == engines("abc-b8")
    assert Path(place).parent == tmp_path / "cache" / "tensorrt" and Path(place).is_dir()
    assert not (tmp_path / "elsewhere").exists()
    others = {engines("def-b8"), engines("abc-b8", {"x": (1, 3, 32, 32)})}
    with monkeypatch.context() as patch:
        patch.setattr(providers, "installed_runtimes", lambda: {"onnxruntime-gpu": "99"})
        others.add(engines("abc-b8"))
    with monkeypatch.context() as patch:
        patch.setitem(session.OPTIONS, "tensorrt", session.OPTIONS["tensorrt"] | {"trt_fp16_enable": "1"})
        others.add(engines("abc-b8"))
    with monkeypatch.context() as patch:
        patch.setattr(providers.torch.cuda, "is_available", lambda: True)
        patch.setattr(providers.torch.cuda, "get_device_name", lambda index: "another GPU")
        others.add(engines("abc-b8"))
    assert len({place, *others}) == 6 and None not in others


def test_no_engines_are_kept_where_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key, with the cache switched off, or (with a warning) in a place that cannot be written."""
    assert engines("") is None
    monkeypatch.setenv(cache.VARIABLE, "")
    assert engines("abc-b8") is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    with pytest.warns(GraphcompWarning, match=f"not kept; set {cache.VARIABLE}"):
        assert engines("abc-b8") is None


def test_options_of_tensorrt() -> None:
    options = providers.tensorrt_options("tensorrt", SHAPES, "abc-b8")
    assert {options[f"trt_profile_{bound}_shapes"] for bound in ("min", "opt", "max")} == {"x:8x3x32x32"}
    assert providers.tensorrt_options("cuda", SHAPES, "abc-b8") == {}


def test_processors_go_without_options_of_gpus_beside_one_alone() -> None:
    """Two of them are no GPU: asked for graphs they refuse, where they were timed without, in silence."""
    assert providers.asked_of(["cpu", "cuda", "tensorrt"]) == {"cuda", "tensorrt"}
    assert providers.asked_of(["cpu", "openvino"]) == {"cpu", "openvino"}
    assert providers.asked_of(["cpu"]) == {"cpu"}


def test_cuda_graphs_are_an_option_of_gpus_alone() -> None:
    assert providers.graph_options("cuda", True) == {"enable_cuda_graph": "1"}
    assert providers.graph_options("tensorrt", True) == {"trt_cuda_graph_enable": "1"}
    assert providers.graph_options("cuda", False) == providers.graph_options("cpu", False) == {}
    for refused in (session.probe, partial(session.open_session, session._probe_model())):
        with pytest.raises(
            BenchError, match="CUDA graphs: found provider 'cpu', expected one of cuda, tensorrt"
        ):
            refused("cpu", cuda_graphs=True)


@pytest.mark.gpu
@needs_gpu
def test_cuda_really_runs() -> None:
    opened = session.probe("cuda")
    assert opened.nodes_per_provider == {"CUDAExecutionProvider": 1}
    assert opened.provider_options["use_tf32"] == "1"
    assert opened.memcpy_nodes == 0
