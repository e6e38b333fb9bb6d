"""OpenVINO as a second runtime: for real where it is installed, else with a stand-in that is ONNX Runtime."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from graphcomp.errors import BenchError, ProviderError
from graphcomp.runtime import benchmark, machine, probe, race, run_errors
from graphcomp.runtime import openvino as adapter
from graphcomp.runtime.openvino import require_agreement
from graphcomp.runtime.session import open_session
from tests.onnx.quantised_files import float_file, ours, samples

SHAPES = {"input": (1, 3, 12, 12)}


class StandIn:
    """What is used of the module, on ONNX Runtime.

    `wrong` is added to every output, `wrong_of_bytes` to those of files that round on the way.
    """

    __version__ = "0"
    wrong = 0.0
    wrong_of_bytes = 0.0

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def Tensor(self, array: Any) -> Any:  # noqa: N802
        return SimpleNamespace(data=array)

    def Core(self) -> Any:  # noqa: N802
        return self

    def read_model(self, model: Any) -> Any:
        try:
            session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        except run_errors() as error:
            raise RuntimeError(str(error)) from error
        content = model if isinstance(model, bytes) else Path(model).read_bytes()
        rounds = b"QuantizeLinear" in content
        return SimpleNamespace(session=session, reshape=self.asked.append, rounds=rounds)

    def compile_model(self, read: Any, device: str, options: dict[str, Any]) -> Any:
        self.asked.append((device, options))
        outputs = [SimpleNamespace(get_any_name=lambda n=o.name: n) for o in read.session.get_outputs()]
        return SimpleNamespace(
            outputs=outputs,
            create_infer_request=lambda: _Request(read, self),
            get_runtime_model=lambda: SimpleNamespace(get_ops=lambda: [1, 2, 3]),
        )


class _Request:
    def __init__(self, read: Any, module: StandIn) -> None:
        self.session, self.module, self.rounds = read.session, module, read.rounds
        self.feeds: dict[str, Any] = {}
        self.found: dict[str, Any] = {}

    def set_tensor(self, name: str, tensor: Any) -> None:
        self.feeds[name] = tensor.data

    def infer(self) -> None:
        names = [o.name for o in self.session.get_outputs()]
        wrong = (
            self.module.wrong if names == ["output"] else 0.0
        )  # the tiny network that it is tried on is right
        wrong += self.module.wrong_of_bytes if self.rounds else 0.0
        values = [y + wrong for y in self.session.run(None, self.feeds)]
        self.found = dict(zip(names, values, strict=True))

    def get_tensor(self, name: str) -> Any:
        return SimpleNamespace(data=self.found[name])


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in in the place of the package."""
    made = StandIn()
    monkeypatch.setitem(sys.modules, "openvino", made)
    yield made


def real() -> None:
    pytest.importorskip("openvino")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stand-in", "real"])
def test_it_computes_what_onnx_runtime_computes(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    module = request.getfixturevalue("module") if kind == "stand-in" else real()
    feeds = {"input": samples()[0]["input"][:1]}
    for path, rounds in ((float_file(tmp_path), False), (ours(tmp_path), True)):
        opened = open_session(path, "openvino", 1, shapes=SHAPES)
        expected = open_session(path).session.run(None, feeds)
        written = open_session(path, plain=True).session.run(None, feeds) if rounds else None
        require_agreement(str(path), opened.session.run(None, feeds), expected, written)
        assert [o.name for o in opened.session.get_outputs()] == ["output"]
        assert opened.nodes_per_provider["OpenVINO"] > 0 and opened.device == "cpu" and opened.tf32 is None
        assert opened.provider_options["INFERENCE_PRECISION_HINT"] == "f32"
    if module is not None:
        assert module.asked[0] == {"input": [1, 3, 12, 12]}
        assert module.asked[1] == ("CPU", adapter.options(1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stand-in", "real"])
def test_the_same_turns_and_intervals(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("module") if kind == "stand-in" else real()
    found = benchmark(
        float_file(tmp_path), ours(tmp_path), provider="openvino", batches=(1, 2), runs=12, seconds=0.2
    )
    assert found.provider == "openvino" and [t.batch for t in found.batches] == [1, 2]
    for timing in found.batches:
        assert timing.base.runs == timing.new.runs >= 12 and timing.speedup.low <= timing.speedup.high
        assert timing.base.end_to_end_median_ms is None and timing.theoretical == 1
    assert set(found.new.nodes_per_provider) == {"OpenVINO"}
    models = [p.read_bytes() for p in (float_file(tmp_path), ours(tmp_path))]
    feeds = {"input": np.zeros((1, 3, 12, 12), np.float32)}
    times = race(models, feeds, "openvino", runs=8, seconds=0.1)
    assert len(times) == 2 and min(times) > 0


@pytest.mark.slow
def test_a_file_that_it_computes_otherwise_is_not_timed(module: StandIn, tmp_path: Path) -> None:
    module.wrong = 0.5
    with pytest.raises(
        BenchError, match=r"model.onnx: found output 0 of OpenVINO .* times of another network"
    ):
        benchmark(float_file(tmp_path), ours(tmp_path), provider="openvino", runs=6, seconds=0.1)


def test_agreement() -> None:
    expected = [np.full((2, 8), 2.0, np.float32), np.arange(3)]
    require_agreement("f", expected, expected)
    near = [expected[0] * np.float32(1 + 5e-4), np.zeros(3)]  # whole numbers are indices
    require_agreement("f", near, expected)
    far = [expected[0] * np.float32(1.05), expected[1]]
    require_agreement("f", far, expected, expected)
    with pytest.raises(BenchError, match=r"f: found output 0 of OpenVINO 0.05 of its norm away"):
        require_agreement("f", far, expected)
    other = [expected[0] * np.float32(1.2), expected[1]]
    for bad in (other[0], np.full((2, 8), np.nan, np.float32)):
        with pytest.raises(BenchError, match="8 bit sums may saturate there; quantise with grid=pairs"):
            require_agreement("f", [bad, expected[1]], expected, expected)
    require_agreement(
        "f", other, expected, [expected[0] * np.float32(0.9), expected[1]]
    )  # it amplifies rounding


def test_without_it_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ProviderError, match=r"'openvino': it cannot be imported .* graphcomp\[openvino\]"):
        probe("openvino")


def test_what_it_cannot_do(module: StandIn, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="explain on provider 'cpu'"):
        open_session(float_file(tmp_path), "openvino", dump=tmp_path / "d.onnx")
    with pytest.raises(BenchError, match="CUDA graphs"):
        probe("openvino", cuda_graphs=True)
    with pytest.raises(BenchError, match=r"OpenVINO cannot load it .*; use provider 'cpu'"):
        open_session(b"no model", "openvino")
    probe("openvino")


def test_its_version_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version_of", lambda name: "7" if name == "openvino" else None)
    assert machine.environment().versions["openvino"] == "7"
