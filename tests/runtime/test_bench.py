import gc
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from graphcomp import records
from graphcomp.errors import BenchError, ProviderError
from graphcomp.runtime import bench, session, tables, turns
from graphcomp.runtime.bench import benchmark, ratio_interval, verdict
from graphcomp.runtime.turns import Samples, TimingBudget

QUICK = {"runs": 12, "seconds": 0.2, "warmup_runs": 1, "warmup_seconds": 0.0}
IDLE = TimingBudget(runs=12, seconds=60)


def write(path: Path, width: int = 8, *, batch: int | str = "n", size: int = 8, name: str = "x") -> Path:
    """conv 3->width, ReLU, mean, linear width->10."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", [name, "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "g"], ["y"], name="head"),
    ]
    weights = {"w": (width, 3, 3, 3), "g": (width, 10)}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])],
        [
            numpy_helper.from_array(rng.standard_normal(dims).astype(np.float32), key)
            for key, dims in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, path)
    return path


def macs(width: int) -> int:
    return width * 27 * 64 + width * 10


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    return write(folder / "base.onnx", 16), write(folder / "new.onnx", 8)


def rounds(median: float, count: int = 100, noise: float = 0.02, seed: int = 0) -> turns.Times:
    """Synthetic milliseconds with the right skew of a stopwatch: never early, sometimes late."""
    rng = np.random.default_rng(seed)
    return np.asarray(median * (1 + noise * (rng.exponential(size=(count, 2)) - np.log(2))))


def interval(low: float, high: float) -> records.Interval:
    return records.Interval(value=(low + high) / 2, low=low, high=high)


# the interval


def test_interval_holds_a_known_ratio_and_little_else() -> None:
    found = ratio_interval(rounds(3.0, seed=1), rounds(1.5, seed=2))
    assert found.low < 2.0 < found.high
    assert found.high - found.low < 0.04
    assert verdict(found, found, busy=False) == "faster"


def test_interval_of_constants_is_a_point() -> None:
    found = ratio_interval(np.full((10, 2), 3.0), np.full((10, 2), 2.0))
    assert (found.low, found.value, found.high) == (1.5, 1.5, 1.5)


@pytest.mark.slow
def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """200 repetitions with ratio 1: 95 % of the intervals hold it, give or take binomial noise (4 sigma)."""
    held = 0
    for seed in range(200):
        found = ratio_interval(rounds(1, 30, seed=2 * seed), rounds(1, 30, seed=2 * seed + 1), seed=seed)
        held += found.low <= 1 <= found.high
    assert held / 200 >= 0.95 - 4 * 0.0154


def test_pairing_survives_drift() -> None:
    """A machine that slows to a third meanwhile: the ratio is known far better than the times."""
    drift = np.linspace(1, 3, 100)[:, None]
    base, new = 1.1 * drift * rounds(1, noise=0.002, seed=1), drift * rounds(1, noise=0.002, seed=2)
    paired = ratio_interval(base, new)
    shuffled = ratio_interval(base, new[np.random.default_rng(0).permutation(100)])
    assert paired.low < 1.1 < paired.high
    assert verdict(paired, paired, busy=False) == "faster"
    assert verdict(shuffled, shuffled, busy=False) == bench.NO_DIFFERENCE


def test_interval_depends_on_the_seed_only() -> None:
    base, new = rounds(2, seed=1), rounds(1, seed=2)
    assert ratio_interval(base, new, seed=3) == ratio_interval(base, new, seed=3)
    assert ratio_interval(base, new, seed=3) != ratio_interval(base, new, seed=4)


def test_interval_of_unpaired_samples_is_an_error() -> None:
    with pytest.raises(BenchError, match="pair them by round"):
        ratio_interval(np.ones((10, 2)), np.ones((9, 2)))


def test_clock_that_does_not_move_is_an_error() -> None:
    with pytest.raises(BenchError, match="too coarse"):
        ratio_interval(np.ones((10, 2)), np.zeros((10, 2)))


# the verdict


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (1.01, 1.2, "faster"),
        (0.8, 0.99, "slower"),
        (0.9, 1.1, bench.NO_DIFFERENCE),
        (1.0, 1.1, bench.NO_DIFFERENCE),
        (0.9, 1.0, bench.NO_DIFFERENCE),
    ],
)
def test_verdict(low: float, high: float, word: str) -> None:
    assert verdict(interval(low, high), interval(0.1, 0.2), busy=False) == word


def test_busy_verdict_is_from_cpu_time_and_says_so() -> None:
    found = verdict(interval(1.5, 2.0), interval(0.9, 1.1), busy=True)
    assert found == "no measurable difference (by CPU time: the machine was busy)"


def timed(wall: float, cpu: float, first: float, seed: int) -> bench.Timed:
    samples = Samples(rounds(wall, seed=seed), rounds(cpu, seed=seed + 1))
    return bench.Timed(samples, [first, first + 1, first + 2], None, [])


def judge(
    wall: tuple[float, float], cpu: tuple[float, float], comparable: bool = True
) -> records.BatchTiming:
    base, new = timed(wall[0], cpu[0], 8.0, seed=1), timed(wall[1], cpu[1], 7.0, seed=3)
    return bench._judge(base, new, comparable, 4, (300, 100), 0)


def test_row_of_a_model_that_is_three_times_faster() -> None:
    row = judge((3, 1), (3, 1))
    assert (row.batch, row.verdict, row.busy, row.theoretical) == (4, "faster", False, 3.0)
    assert row.speedup.value == pytest.approx(3, rel=0.01)
    assert (row.base.runs, row.base.first_ms, row.new.first_ms) == (200, 9.0, 8.0)
    assert row.new.median_ms < row.new.p90_ms < row.new.p99_ms


def test_row_of_a_busy_machine() -> None:
    row = judge((6, 3), (2, 2))
    assert row.busy
    assert row.speedup.low > 1
    assert row.verdict.startswith(bench.NO_DIFFERENCE)


def test_wall_over_cpu_says_nothing_with_threads_or_a_gpu() -> None:
    row = judge((6, 3), (2, 2), comparable=False)
    assert (row.busy, row.verdict) == (False, "faster")


@pytest.mark.parametrize(("wall", "busy"), [(1.09, False), (1.11, True)])
def test_busy_from_ten_per_cent_on(wall: float, busy: bool) -> None:
    ones = np.ones((6, 10, 2))
    assert turns.is_busy(2 * [Samples(wall * ones, ones)]) is Samples(wall * ones, ones).busy is busy


def test_a_few_long_stalls_are_busy_though_medians_are_clean() -> None:
    ones = np.ones((6, 10, 2))
    stalled = ones.copy()
    stalled[0, 0, 0] = 40
    assert turns.is_busy([Samples(stalled, ones), Samples(ones, ones)])


# the loop


def take_turns(
    *steps: Callable[[], object], budget: TimingBudget = IDLE, order: Sequence[int] = (0, 1)
) -> Any:
    return turns._take_turns(steps, order, 1, budget.spent)


def test_turns_are_a_b_b_a() -> None:
    turns: list[str] = []
    steps = lambda: turns.append("A"), lambda: turns.append("B"), lambda: turns.append("C")
    samples = take_turns(*steps[:2])
    assert "".join(turns) == "ABBA" * 6
    assert [one.wall.shape for one in samples] == [one.cpu.shape for one in samples] == [(6, 2)] * 2
    turns.clear()
    take_turns(*steps, order=(2, 0, 1), budget=TimingBudget(runs=4, seconds=60))
    assert "".join(turns) == "CABBAC" * 2


def test_times_stay_with_their_model_and_round(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0]

    def step(cost: int) -> None:
        now[0] += cost

    monkeypatch.setattr(bench.time, "thread_time_ns", lambda: now[0])
    samples = take_turns(lambda: step(2_000_000), lambda: step(5_000_000), order=(1, 0))
    assert np.array_equal(samples[0].cpu, np.full((6, 2), 2.0))
    assert np.array_equal(samples[1].cpu, np.full((6, 2), 5.0))


@pytest.mark.parametrize(
    ("runs", "seconds", "count"), [(12, 60, 6), (13, 60, 7), (200, 60, 100), (200, 0, 1), (1, 60, 1)]
)
def test_runs_or_seconds_whichever_first_but_a_round(runs: int, seconds: float, count: int) -> None:
    samples = take_turns(lambda: None, lambda: None, budget=TimingBudget(runs, seconds))
    assert len(samples[0].wall) == count


def test_budget_of_a_load_is_its_part_and_all_runs_of_warming_up() -> None:
    assert TimingBudget(200, 12.0, 10, 3.0).of_a_load(6) == TimingBudget(33, 2.0, 10, 0.5)
    assert TimingBudget(1, 0.0).of_a_load(6) == TimingBudget(2, 0.0)


def test_a_race_loads_its_models_in_alternating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was opened second was faster; so both are, as often as the other."""
    opened: list[int] = []
    took: list[int] = []

    class Runner:
        def __init__(self, session: int, *_: Any) -> None:
            self.session = session

        def first(self) -> None:
            self.run()

        def run(self) -> None:
            took.append(self.session)

    def open_one(model: bytes, *_: Any, **__: Any) -> int:
        opened.append(int(model))
        return int(model)

    monkeypatch.setattr(turns, "open_session", open_one)
    monkeypatch.setattr(turns, "_Runner", Runner)
    found = turns.race([b"0", b"1"], {}, "cpu", runs=24, seconds=60.0)
    assert opened == [0, 1, 1, 0, 1, 0, 0, 1] and len(found) == 2
    each = 2 + 2 * (24 // turns.RACE_LOADS // 2)  # the first two warm up, then rounds of two
    assert [took.count(model) for model in (0, 1)] == [turns.RACE_LOADS * each] * 2
    opened.clear()
    turns.race([b"0", b"1"], {}, "cpu", runs=2, seconds=0.0, loads=1)
    assert opened == [0, 1]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_place_in_the_order_is_shared_out(count: int) -> None:
    """Two loads are each other's mirror images; over all loads nobody is always the first."""
    orders = [turns._order(count, number) for number in range(turns.LOADS)]
    for one, other in zip(orders[::2], orders[1::2], strict=True):
        assert sorted(one) == list(range(count)) and other == one[::-1]
    assert len({order[0] for order in orders}) >= min(count, turns.LOADS // 2)


def test_a_load_that_was_slow_is_in_the_interval() -> None:
    """Three loads of six favour one side by 4 %: no run differs within a load, still it is known."""
    base = np.ones((6, 50, 2)) * np.array([1.04, 1, 1.04, 1, 1.04, 1])[:, None, None]
    found = ratio_interval(base, np.ones_like(base))
    assert (found.low, found.high) == pytest.approx((1.0, 1.04))
    one_load = ratio_interval(base[0], np.ones_like(base[0]))
    assert (one_load.low, one_load.high) == pytest.approx((1.04, 1.04))


def test_every_load_has_as_many_rounds_as_the_first(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    original = turns._open

    def spy(file: Any, *rest: Any) -> Any:
        opened.append(file.path.stem)
        return original(file, *rest)

    monkeypatch.setattr(turns, "_open", spy)
    found = turns.in_turn(files, runs=36, seconds=60.0, warmup_seconds=0.0)
    assert [one.wall.shape for one in found] == [(6, 3, 2)] * 2
    assert opened == [files[i].stem for n in range(6) for i in turns._order(2, n)]
    assert (opened.count("base"), opened.count("new")) == (6, 6)


def test_garbage_collection_is_off_while_timing_and_on_again_after_a_failure() -> None:
    seen = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_turns(fail, fail)
    assert seen == [False]
    assert gc.isenabled()


def test_progress_is_throttled_but_ends_at_one() -> None:
    calls: list[tuple[str, float]] = []
    report = bench._throttle(lambda what, share: calls.append((what, share)), "batch 2", seconds=60)
    for share in (0.1, 0.5, 0.9, 1.0):
        report("timing", share)
    assert calls[-1] == ("batch 2: timing", 1.0)
    assert len(calls) == 2


def test_any_number_of_files_take_turns(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A round a load at least, whatever the number of files; of which any two make an interval."""
    third = write(tmp_path / "third.onnx", 4)
    found = turns.in_turn([*files, third], runs=1, seconds=0.0, warmup_seconds=0.0)
    assert [one.wall.shape for one in found] == [one.cpu.shape for one in found] == [(6, 1, 2)] * 3
    assert all((one.wall > 0).all() for one in found)
    ratio = ratio_interval(found[0].wall, found[2].wall)
    assert ratio.low <= ratio.value <= ratio.high
    with pytest.raises(BenchError, match="expected the same names, types and sizes"):
        turns.in_turn([files[0], write(tmp_path / "other.onnx", 4, size=6)])


def test_bound_runs_compute_what_the_session_computes(files: tuple[Path, Path]) -> None:
    opened = session.open_session(files[0])
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    runner = turns._Runner(opened, {"x": x}, files[0])
    runner.first()
    runner.run()
    (expected,) = opened.session.run(None, {"x": x})
    (found,) = runner._binding.copy_outputs_to_cpu()
    assert np.array_equal(found, expected)


def test_later_runs_write_to_the_buffers_of_the_first(files: tuple[Path, Path]) -> None:
    runner = turns._Runner(session.open_session(files[0]), {"x": np.ones((1, 3, 8, 8), np.float32)}, files[0])
    runner.first()
    before = runner._binding.get_outputs()[0].data_ptr()
    runner._values["x"].update_inplace(np.zeros((1, 3, 8, 8), np.float32))
    runner.run()
    assert runner._binding.get_outputs()[0].data_ptr() == before
    assert not runner._binding.copy_outputs_to_cpu()[0].any()


def test_end_to_end_takes_its_inputs_from_the_host(files: tuple[Path, Path]) -> None:
    runner = turns._Runner(session.open_session(files[0]), {"x": np.ones((1, 3, 8, 8), np.float32)}, files[0])
    runner.first()
    runner._arrays["x"] = np.zeros((1, 3, 8, 8), np.float32)
    runner.run_end_to_end()
    assert not runner._binding.copy_outputs_to_cpu()[0].any()


# the whole


def test_benchmark_records_everything_beside_the_numbers(files: tuple[Path, Path]) -> None:
    phases: set[str] = set()
    before = sorted(files[0].parent.iterdir())
    found = benchmark(*files, batches=(1, 4), progress=lambda what, share: phases.add(what), **QUICK)
    assert found == records.Bench.model_validate_json(found.model_dump_json())
    assert [row.batch for row in found.batches] == [1, 4]
    assert (found.provider, found.threads, found.tf32) == ("cpu", 1, None)
    assert found.base.sha256 == hashlib.sha256(files[0].read_bytes()).hexdigest()
    assert found.new.bytes == files[1].stat().st_size
    assert (found.base.macs, found.new.macs) == (macs(16), macs(8))
    assert found.base.nodes_per_provider == {"CPUExecutionProvider": 5}
    assert {"batch 1: timing", "batch 4: warming up"} <= phases
    assert sorted(files[0].parent.iterdir()) == before
    for row in found.batches:
        assert row.theoretical == macs(16) / macs(8)
        assert row.base.runs == row.new.runs >= 12
        assert row.base.end_to_end_median_ms is None
        for stats in (row.base, row.new):
            assert 0 < stats.median_ms <= stats.p90_ms <= stats.p99_ms
            assert stats.first_ms > 0
            assert stats.cpu_median_ms > 0
        for speedup in (row.speedup, row.cpu_speedup):
            assert 0 < speedup.low <= speedup.high


def test_a_file_against_itself_has_the_same_columns(files: tuple[Path, Path]) -> None:
    (row,) = benchmark(files[0], files[0], threads=2, **QUICK).batches
    assert row.theoretical == 1
    assert not row.busy
    assert row.speedup.low <= row.speedup.value <= row.speedup.high


def test_table_shows_measured_beside_theory(files: tuple[Path, Path]) -> None:
    found = benchmark(*files, batches=(2,), **QUICK)
    console = Console(width=250)
    with console.capture() as captured:
        console.print(tables.format_table(found))
    text = " ".join(captured.get().split())  # captions wrap
    row = found.batches[0]
    assert f"{row.speedup.value:.3f}x [{row.speedup.low:.3f}, {row.speedup.high:.3f}]" in text
    assert "2.00x" in text
    assert row.verdict in text
    assert "base base.onnx" in text
    assert "end to end" not in text


def test_a_sweep_is_one_line_a_batch_with_providers_side_by_side(files: tuple[Path, Path]) -> None:
    one = benchmark(*files, batches=(1, 4), **QUICK)
    rows = [row.model_copy(update={"speedup": interval(1.4, 1.6), "busy": False}) for row in one.batches]
    busy = [
        row.model_copy(update={"cpu_speedup": interval(1.0, 1.2), "busy": True, "theoretical": 2.0})
        for row in rows
    ]
    pair = [
        one.model_copy(update={"batches": rows}),
        one.model_copy(update={"provider": "cuda", "batches": busy}),
    ]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(tables.sweep_table(pair))
    lines = [line.split() for line in capture.get().splitlines() if "[" in line]
    assert [line[1] for line in lines] == ["1", "4"]
    for line in lines:
        assert "1.500x" in line and "1.100x" in line and "*" in line and "55%" in line
    assert "cuda, 95 % interval" in capture.get() and "* CPU time" in capture.get()


def test_fixed_batch_files_are_timed_at_their_batch(tmp_path: Path) -> None:
    base, new = write(tmp_path / "b.onnx", 16, batch=4), write(tmp_path / "n.onnx", 8, batch=4)
    found = benchmark(base, new, batches=(4,), **QUICK)
    assert found.new.macs == macs(8)
    with pytest.raises(BenchError, match=r"b\.onnx: found a fixed batch of 4, expected 1"):
        benchmark(base, new, **QUICK)


def test_one_fixed_batch_is_enough_to_refuse(tmp_path: Path, files: tuple[Path, Path]) -> None:
    new = write(tmp_path / "n.onnx", batch=4)
    assert [row.batch for row in benchmark(files[0], new, batches=(4,), **QUICK).batches] == [4]
    with pytest.raises(BenchError, match=r"n\.onnx: found a fixed batch of 4, expected 1"):
        benchmark(files[0], new, **QUICK)


@pytest.mark.parametrize("change", [{"size": 16}, {"name": "image"}])
def test_files_with_other_inputs_are_refused_by_both_names(
    tmp_path: Path, files: tuple[Path, Path], change: dict[str, object]
) -> None:
    new = write(tmp_path / "other.onnx", **change)
    with pytest.raises(BenchError, match="expected the same names, types and sizes") as caught:
        benchmark(files[0], new, **QUICK)
    assert str(files[0]) in str(caught.value)
    assert str(new) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"batches": ()}, "batches"),
        ({"batches": (1, 0)}, "batches"),
        ({"runs": 0}, "runs"),
        ({"seconds": -1.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"warmup_runs": -1}, "warmup_runs"),
        ({"threads": 0}, "threads"),
    ],
)
def test_options_out_of_range(files: tuple[Path, Path], change: dict[str, object], place: str) -> None:
    with pytest.raises(BenchError, match=f"^{place}: found"):
        benchmark(*files, **(QUICK | change))


def test_missing_file(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with pytest.raises(BenchError, match=r"none\.onnx: cannot be read"):
        benchmark(files[0], tmp_path / "none.onnx", **QUICK)


def test_model_without_products_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    path = tmp_path / "relu.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    with pytest.raises(BenchError, match="found no convolution or matrix product"):
        benchmark(path, path, **QUICK)


def test_model_that_fails_when_run_is_refused(tmp_path: Path) -> None:
    """A Gather beyond the end is legal to load and fails at the first inference."""
    nodes = [
        helper.make_node("Gather", ["x", "i"], ["g"], axis=1),
        helper.make_node("MatMul", ["g", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [
            numpy_helper.from_array(np.array([7]), "i"),
            numpy_helper.from_array(np.ones((1, 1), np.float32), "w"),
        ],
    )
    path = tmp_path / "gather.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    with pytest.raises(BenchError, match=r"gather\.onnx: found an error when run"):
        benchmark(path, path, **QUICK)


def test_inputs_that_cannot_be_generated_are_refused(tmp_path: Path) -> None:
    file = onnx.load(write(tmp_path / "x.onnx"))
    file.graph.input[0].type.tensor_type.elem_type = TensorProto.BFLOAT16
    onnx.save(file, tmp_path / "x.onnx")
    with pytest.raises(BenchError, match=r"input x BFLOAT16 .* cannot be generated"):
        turns.random_inputs(bench.onnxfile.read(tmp_path / "x.onnx"), 1, 0)


def test_inputs_depend_on_the_seed_only(files: tuple[Path, Path]) -> None:
    file = bench.onnxfile.read(files[0])
    first, again, other = (turns.random_inputs(file, 2, seed)["x"] for seed in (1, 1, 2))
    assert first.shape == (2, 3, 8, 8)
    assert first.dtype == np.float32
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def has_cuda() -> bool:
    try:
        session.probe("cuda")
    except ProviderError:
        return False
    return True


@pytest.mark.skipif(has_cuda(), reason="this machine has a working CUDA provider")
def test_absent_cuda_is_refused_not_replaced(files: tuple[Path, Path]) -> None:
    with pytest.raises(
        ProviderError, match=r"CUDAExecutionProvider does not work on this machine .*use provider 'cpu'"
    ):
        benchmark(*files, provider="cuda", **QUICK)


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="no working CUDA provider on this machine")
def test_cuda_times_with_and_without_copies(files: tuple[Path, Path]) -> None:
    found = benchmark(*files, provider="cuda", **QUICK)
    assert found.tf32 is not None
    assert found.base.nodes_per_provider.get("CUDAExecutionProvider", 0) >= 2
    assert found.batches[0].base.end_to_end_median_ms is not None
    assert "end to end" in [column.header for column in tables.format_table(found).columns]
