"""Traces read: times, shapes and what is wrong with them; and one that is written here and now."""

import json
from pathlib import Path
from typing import Any

import pytest

from graphcomp.errors import BenchError, ProviderError
from graphcomp.explanation import profiling
from graphcomp.explanation.profiling import Node, read_trace, trace_cost, trace_pair
from graphcomp.runtime import Provider, onnxfile
from graphcomp.runtime.turns import random_inputs
from tests.explaining import TRACES, base, pruned, recorded

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CONV, RELU = Node("conv", "Conv", "", ("x", "w"), ("c",)), Node("relu", "Relu", "", ("c",), ("y",))


def node(name: str, dur: float, provider: str = CPU) -> dict[str, Any]:
    shapes = {"input_type_shape": [{"float": [1, 3, 8, 8]}, {"float": [16, 3, 3, 3]}, {"float": []}]}
    args = {"provider": provider, **shapes, "output_type_shape": [{"float": [1, 16, 8, 8]}]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": args}


def kernel(name: str, dur: float, **args: str) -> dict[str, Any]:
    return {"cat": "Kernel", "name": name, "dur": dur, "args": args}


RUN = {"cat": "Session", "name": "model_run", "dur": 100}


def test_times_are_interquartile_means_of_what_comes_after_the_warm_up() -> None:
    times = [900, 800, 700, 10, 11, 11, 12, 500, 1]
    events = [event for dur in times for event in (node("conv", dur), RUN)]
    found = read_trace(events, (CONV,), "cpu", "x")
    assert found.operators[0].ms == pytest.approx((10 + 11 + 11 + 12) / 4e3 + 0.0005)
    assert (found.runs, found.run_ms, found.busy) == (6, 0.1, False)
    assert found.operators[0].inputs == ((1, 3, 8, 8), (16, 3, 3, 3), ())
    assert found.operators[0].outputs == ((1, 16, 8, 8),)


def test_the_cost_of_tracing_is_taken_off_and_no_time_is_negative() -> None:
    events = [event for _ in range(6) for event in (node("conv", 10), node("relu", 1), RUN)]
    found = read_trace(events, (CONV, RELU), "cpu", "x", cost_ms=0.002)
    assert [operator.ms for operator in found.operators] == pytest.approx([0.0085, 0.0])
    assert found.cost_ms == 0.002


def test_nodes_without_a_name_have_the_traces() -> None:
    """Functions that the runtime inlines leave them behind; a name is the operator's and a number."""
    graph = [Node("", "HardSigmoid", "", ("x",), ("s",)), Node("", "Mul", "", ("x", "s"), ("t",))]
    graph = [*graph, CONV, Node("", "Mul", "", ("c", "t"), ("y",))]
    ran = [("HardSigmoid", 158, 1), ("Mul", 159, 2), ("Conv", None, 3), ("Mul", 7, 4)]
    events = []
    for op, number, dur in ran:
        event = node("conv" if number is None else f"{op}_{number}", dur)
        events.append({**event, "args": {**event["args"], "op_name": op}})
    found = read_trace([*events, RUN] * 6, tuple(graph), "cpu", "x")
    assert [o.node.name for o in found.operators] == ["HardSigmoid_158", "Mul_159", "conv", "Mul_7"]
    assert [o.ms for o in found.operators] == pytest.approx([0.0015, 0.0025, 0.0035, 0.0045])
    with pytest.raises(BenchError, match="found 0 events of Mul ''"):
        read_trace([*events[:3], RUN] * 6, tuple(graph), "cpu", "x")


def test_on_a_busy_machine_the_fastest_quarter_counts() -> None:
    times = [0, 0, 0, 10, 20, 30, 40, 50, 60, 70, 80]
    events = [event for dur in times for event in (node("conv", dur), RUN)]
    found = read_trace(events, (CONV,), "cpu", "x", busy=True)
    assert (found.operators[0].ms, found.busy) == (pytest.approx(0.0155), True)


def test_gpu_times_are_those_of_the_kernels_behind_an_operator() -> None:
    """As the runtime documents it: kernels follow the operator that launched them."""
    one = [
        node("conv", 3, CUDA),
        kernel("pad", 5),
        kernel("sgemm", 40),
        node("relu", 2, CUDA),
        kernel("relu", 4),
    ]
    found = read_trace([*one, RUN] * 6, (CONV, RELU), "cuda", "x", cost_ms=0.001)
    assert [operator.ms for operator in found.operators] == pytest.approx([0.045, 0.004])
    assert [operator.kernels for operator in found.operators] == [("pad", "sgemm"), ("relu",)]
    assert {operator.provider for operator in found.operators} == {CUDA}


def test_gpu_kernels_that_name_their_operator_need_no_order() -> None:
    late = kernel("sgemm", 40, parent_name="conv_kernel_time")
    one = [node("conv", 3, CUDA), node("relu", 2, CUDA), kernel("relu", 4), late]
    found = read_trace([*one, RUN] * 6, (CONV, RELU), "cuda", "x")
    assert [operator.ms for operator in found.operators] == pytest.approx([0.040, 0.004])


def test_what_a_gpu_session_runs_on_the_cpu_has_host_time_and_a_silent_gpu_operator_none() -> None:
    shape, view = (Node(name, "Reshape", "", ("x",), ("y",)) for name in ("shape", "view"))
    one = [node("conv", 3, CUDA), kernel("sgemm", 40), node("shape", 7, CPU), node("view", 5, CUDA)]
    found = read_trace([*one, RUN] * 6, (CONV, shape, view), "cuda", "x")
    assert [operator.ms for operator in found.operators] == pytest.approx([0.040, 0.0075, 0.0])


def test_a_gpu_trace_without_kernels_is_refused() -> None:
    events = [node("conv", 3, CUDA), RUN] * 6
    with pytest.raises(
        BenchError, match=r"x: found no Kernel events .* expected a runtime that was built with"
    ):
        read_trace(events, (CONV,), "cuda", "x")


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "x: found no operator in the trace"),
        ([RUN] * 6, "x: found no operator in the trace"),
        ([node("conv", 1), RUN] * 3, "x: found 3 runs in the trace, expected more than 3"),
        ([node("other", 1), RUN] * 6, "x: found 0 events of Conv 'conv' in 6 runs, expected one a run"),
        ([node("conv", 1), node("conv", 1), RUN] * 6, "x: found 12 events of Conv 'conv' in 6 runs"),
    ],
)
def test_a_trace_that_explains_nothing(events: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        read_trace(events, (CONV,), "cpu", "x")


def test_a_file_that_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text("[{")
    with pytest.raises(BenchError, match=r"trace\.json: found no trace"):
        profiling._events(tmp_path / "trace.json")


def test_recorded_traces_hold_every_operator_of_their_graph() -> None:
    for name, count in (("base", 8), ("pruned", 14), ("factored", 10)):
        found = recorded(name)
        stored = json.loads((TRACES / f"{name}.json").read_text())
        assert [o.node.name for o in found.operators] == [n["name"] for n in stored["graph"]]
        assert len(found.operators) == count and found.runs == 6
        assert 0 < sum(o.ms for o in found.operators) < found.run_ms


@pytest.mark.slow
def test_two_files_traced_by_turns(tmp_path: Path) -> None:
    files = onnxfile.read(base(tmp_path / "a.onnx")), onnxfile.read(pruned(tmp_path / "b.onnx"))
    told: list[float] = []
    found = trace_pair(
        files, random_inputs(files[0], 2, 0), runs=8, seconds=60, tell=lambda _, x: told.append(x)
    )
    assert [profile.runs for profile in found] == [8, 8]
    assert told[-1] == 1.0 and told == sorted(told)
    for profile in found:
        heavy = [o for o in profile.operators if o.node.op in ("Conv", "FusedConv")]
        assert heavy and all(o.ms >= 0 and o.inputs[0][0] == 2 for o in heavy)
        assert profile.run_ms > 0 and profile.cost_ms == found[0].cost_ms
    again = trace_pair(files, random_inputs(files[0], 1, 0), runs=100, seconds=0)
    assert [profile.runs for profile in again] == [6, 6]


def test_the_cost_of_tracing_is_a_small_time() -> None:
    assert 0 <= trace_cost(runs=12) < 1


@pytest.mark.parametrize("provider", ["tensorrt", "openvino"])
def test_providers_without_a_time_for_an_operator(provider: Provider, tmp_path: Path) -> None:
    files = (onnxfile.read(base(tmp_path / "a.onnx")),) * 2
    with pytest.raises(
        BenchError, match=rf"a\.onnx: found provider '{provider}', which tells no time of each"
    ):
        trace_pair(files, random_inputs(files[0], 1, 0), provider)


def test_a_provider_that_does_not_work_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = (onnxfile.read(base(tmp_path / "a.onnx")),) * 2

    def refuse(*_: Any, **__: Any) -> None:
        raise ProviderError("provider 'cuda': not here")

    monkeypatch.setattr(profiling, "open_session", refuse)
    with pytest.raises(ProviderError, match="not here"):
        trace_pair(files, random_inputs(files[0], 1, 0), "cuda")
