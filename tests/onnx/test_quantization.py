"""8 bit files: scales against a simulator of saturation, ranges and biases against oracles, and a network
end to end."""

import base64
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from onnx import ModelProto, helper
from torch import Tensor, nn

from graphcomp.data import Split
from graphcomp.errors import BenchError, DataError, ExportError
from graphcomp.ir import trace
from graphcomp.measure import paired_difference
from graphcomp.onnx import export_onnx, quantize_file, quantize_onnx, requantize
from graphcomp.onnx.quantization import attempts, checks, grids, qdq, sessions
from graphcomp.onnx.quantization import quantize as quantizing
from graphcomp.onnx.quantization.checks import run_all
from graphcomp.onnx.quantization.layers import find_layers
from graphcomp.onnx.quantization.ranges import BINS, Histogram, collect
from graphcomp.records import BatchTiming, Bench, Interval, ModelFile, Plan, TimingStats
from graphcomp.runtime import adds_in_int16, environment, machine

SATURATES = pytest.mark.skipif(not adds_in_int16(), reason="this machine's kernels add in int32")
WEIGHTS = arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
    elements=st.floats(-8, 8, width=32).filter(lambda w: w == 0 or abs(w) > 1e-6),
)


def simulate_saturation(weights: NDArray[np.int8]) -> NDArray[np.bool_]:
    """By running `vpmaddubsw` itself on all corners of activations: in which channels int16 is left."""
    found = np.zeros(len(weights), bool)
    for channel, taps in enumerate(weights.astype(np.int64)):
        for j in range(0, len(taps), 2):
            pair = taps[j : j + 2]
            for corner in np.ndindex(*[2] * len(pair)):
                total = int((255 * np.array(corner) * pair).sum())
                found[channel] |= not -(2**15) <= total < 2**15
    return found


@pytest.mark.slow
@given(arrays(np.int8, st.tuples(st.integers(1, 4), st.integers(1, 9))))
def test_saturation_is_what_the_instruction_does(weights: NDArray[np.int8]) -> None:
    assert (grids.saturates(weights) == simulate_saturation(weights)).all()


@pytest.mark.slow
@given(WEIGHTS)
def test_pairs_never_saturate_and_no_smaller_scale_would_do(taps: NDArray[np.float32]) -> None:
    plain, pairs = (grids.scales(taps, grid) for grid in ("plain", "pairs"))
    assert not simulate_saturation(grids.quantised(taps, pairs)).any()
    assert (plain <= pairs).all() and (pairs <= 2 * plain).all()
    wider = pairs > plain
    smaller = np.where(wider, np.nextafter(pairs, np.float32(0)), pairs)
    assert (simulate_saturation(grids.quantised(taps, smaller)) == wider).all()


@pytest.mark.slow
@given(WEIGHTS)
def test_nothing_is_clipped_by_more_than_half_a_step(taps: NDArray[np.float32]) -> None:
    for grid in ("plain", "pairs", "reduced"):
        scale = grids.scales(taps, grid)
        error = np.abs(grids.quantised(taps, scale) * scale[:, None].astype(np.float64) - taps)
        assert (error <= scale[:, None] * 0.5001).all()


def test_scales_of_nothing_and_of_large_biases() -> None:
    taps = np.zeros((2, 3), np.float32)
    assert grids.scales(taps, "pairs").tolist() == [1, 1]
    assert grids.scales(taps, "pairs", np.array([0, 0.25])).tolist() == [1, 0.25]


def test_pairs_are_finer_than_seven_bits() -> None:
    taps = np.random.default_rng(0).standard_normal((64, 144)).astype(np.float32)
    pairs, plain, reduced = (grids.scales(taps, g).mean() for g in ("pairs", "plain", "reduced"))
    assert plain < pairs < 0.8 * reduced


@pytest.mark.slow
@given(
    st.lists(
        arrays(np.float32, st.integers(1, 20), elements=st.floats(-(2.0**70), 2.0**70, width=32)),
        min_size=1,
        max_size=5,
    ),
    st.randoms(),
)
def test_a_stream_in_any_order_has_the_histogram_of_all_at_once(
    parts: list[NDArray[np.float32]], random: Any
) -> None:
    once, stream = Histogram(), Histogram()
    once.add(np.concatenate(parts))
    shuffled = list(parts)
    random.shuffle(shuffled)
    for part in shuffled:
        stream.add(part)
    assert once.exponent == stream.exponent and (once.counts == stream.counts).all()
    assert (once.low, once.high) == (stream.low, stream.high)


@pytest.mark.slow
@given(
    arrays(np.float32, st.integers(1, 300), elements=st.floats(-50, 50, width=32)),
    st.sampled_from([None, 99.99, 99.0, 90.0, 50.0]),
)
def test_ranges_hold_what_they_say_and_no_bin_more(
    values: NDArray[np.float32], percentile: float | None
) -> None:
    histogram = Histogram()
    histogram.add(values)
    low, high = histogram.range(percentile)
    cut = 0.0 if percentile is None else (100 - percentile) / 200 * len(values)
    assert (values < low).sum() <= cut and (values > high).sum() <= cut
    width = 2.0 ** (histogram.exponent + 1) / BINS
    assert (values <= low + width).sum() > cut or low == values.min()
    assert (values >= high - width).sum() > cut or high == values.max()


class Convolutions(nn.Module):
    """Kinds of convolutions that have kernels of their own, a residual, pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 24, 1, groups=4)
        self.last = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 10)."""
        x = self.first(x).relu()
        x = (x + self.second(x)).relu()
        x = self.grouped(self.depthwise(x).relu()).relu()
        y: Tensor = self.last(x.mean((2, 3)))
        return y


def exported(folder: Path, model: nn.Module | None = None) -> Path:
    """The network, in a file."""
    torch.manual_seed(0)
    path = folder / "model.onnx"
    program = trace((model or Convolutions()).eval(), (torch.randn(1, 3, 12, 12),))
    export_onnx(program, path, batches=(1, 2))
    return path


def split_of(count: int, labels: Tensor | None = None, seed: int = 0) -> Split:
    """Random images."""
    images = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    given = torch.zeros(count, dtype=torch.long) if labels is None else labels
    return Split(given, np.arange(count), lambda i: (images[torch.from_numpy(i)],), labels is not None)


def feeds_of(model: ModelProto, split: Split) -> list[dict[str, NDArray[Any]]]:
    return [{model.graph.input[0].name: x.numpy()} for (x,), _ in split.batches(8)]


class Reader:
    """For ONNX Runtime's calibrators."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._rest = iter(batches)

    def get_next(self) -> Any:
        return next(self._rest, None)


@pytest.mark.slow
def test_ranges_are_those_of_the_runtimes_own_calibrators(tmp_path: Path) -> None:
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    path = exported(tmp_path)
    model = onnx.load(path)
    feeds = feeds_of(model, split_of(24))
    ours = collect(model, find_layers(model)[0], feeds)
    for method, percentile, options in (
        (CalibrationMethod.MinMax, None, {}),
        (CalibrationMethod.Percentile, 99.9, {"percentile": 99.9, "num_bins": BINS, "symmetric": False}),
    ):
        calibrator = create_calibrator(
            path, None, str(tmp_path / "augmented.onnx"), calibrate_method=method, extra_options=options
        )
        calibrator.collect_data(Reader(feeds))
        theirs = {name: data.range_value for name, data in calibrator.compute_data().items()}
        mine = ours.ranges(percentile)
        assert set(theirs) <= set(mine)
        for name, (low, high) in theirs.items():
            near = 1e-6 if percentile is None else 2.0 ** (ours.histograms[name].exponent + 1) / BINS * 2
            assert mine[name] == pytest.approx((np.asarray(low).item(), np.asarray(high).item()), abs=near), (
                name
            )


def test_corrected_biases_keep_means_in_float64(tmp_path: Path) -> None:
    """Against torch's float64 convolution, unpadded, where the mean of outputs is linear in that of
    inputs."""
    torch.manual_seed(0)
    path = tmp_path / "one.onnx"
    net = nn.Sequential(nn.Conv2d(4, 6, 1, groups=2), nn.ReLU(), nn.Conv2d(6, 5, 1, bias=False)).eval()
    x = torch.randn(8, 4, 12, 12)
    export_onnx(trace(net, (x[:1],)), path, batches=(1,))
    model = onnx.load(path)
    layers, _ = find_layers(model)
    statistics = collect(model, layers, [{model.graph.input[0].name: x.numpy()}])
    scales = {layer.weight: np.full(layer.values.shape[0], 0.1, np.float32) for layer in layers}
    weights = {layer.weight: grids.quantised(layer.taps(), scales[layer.weight]) for layer in layers}
    qdq.correct_biases(model, layers, scales, weights, statistics.means)
    corrected, _ = find_layers(model)
    reads = x.double()
    for layer, index in zip(corrected, (0, 2), strict=True):
        convolution = net.double()[index]
        assert isinstance(convolution, nn.Conv2d) and layer.bias_values is not None
        expected = convolution(reads).mean((0, 2, 3)).detach().numpy()
        rounded = torch.from_numpy(np.rint(layer.values / np.float32(0.1)) * np.float64(np.float32(0.1)))
        found = nn.functional.conv2d(reads, rounded, groups=convolution.groups)
        found = found.mean((0, 2, 3)).detach().numpy()
        assert np.abs(found - expected).max() > 1e-3
        assert found + layer.bias_values == pytest.approx(expected, abs=1e-5)
        reads = convolution(reads).relu()


def ort_defaults(path: Path, folder: Path, feeds: Sequence[Any]) -> bytes:
    from onnxruntime.quantization import quantize_static

    out = folder / "theirs.onnx"
    quantize_static(path, out, Reader(feeds))
    return out.read_bytes()


@pytest.mark.slow
def test_a_network_end_to_end(tmp_path: Path) -> None:
    path, out = exported(tmp_path), tmp_path / "model-int8.onnx"
    before = path.read_bytes()
    made = quantize_onnx(path, out, split_of(128), faster_only=False)
    assert path.read_bytes() == before and made.path == str(out) and made.int8_bytes == out.stat().st_size
    assert not made.in_float and made.snr_db == max(made.tried_db.values()) and len(made.tried_db) == 5
    assert [layer.name for layer in made.layers] == ["first", "second", "depthwise", "grouped", "last"]
    assert all(layer.steps in (0, 1) and (layer.snr_db or 0) > 15 for layer in made.layers)
    assert made.operators["QLinearConv"] == 4 and made.operators["QGemm"] == 1
    assert (made.samples, made.held_out) == (96, 32)
    model, fresh = onnx.load(path), split_of(64, seed=1)
    feeds = feeds_of(model, fresh)
    expected = [y for b in checks.run_all(before, feeds) for y in b]
    ours, theirs = (
        checks.snr(expected, [y for b in checks.run_all(file, feeds) for y in b])
        for file in (out.read_bytes(), ort_defaults(path, tmp_path, feeds_of(model, split_of(128))))
    )
    assert ours > theirs + 1


@SATURATES
@pytest.mark.slow
def test_plain_eight_bits_saturate_here_and_are_refused(tmp_path: Path) -> None:
    net = Convolutions()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.sign() * 0.1)
    path, out = exported(tmp_path, net), tmp_path / "model-int8.onnx"
    with pytest.raises(ExportError, match=r"steps of its output .*'plain'.* use pairs or reduced"):
        quantize_onnx(path, out, split_of(64), grid="plain", faster_only=False)
    assert not out.exists()
    for grid in ("pairs", "reduced"):
        made = quantize_onnx(path, out, split_of(64), grid=grid, faster_only=False)
        assert made.grid == grid and all((layer.steps or 0) <= 1 for layer in made.layers)
    assert quantize_onnx(path, out, split_of(64), faster_only=False).grid == "pairs"


def judged(monkeypatch: pytest.MonkeyPatch, *verdicts: str, ratio: float = 1.5) -> None:
    """Every race ends so, at batch 1, 2, …"""

    def benchmark(base: Path, new: Path, **_: Any) -> Bench:
        stats = TimingStats(runs=6, first_ms=1, median_ms=1, p90_ms=1, p99_ms=1, cpu_median_ms=1)
        interval = Interval(value=ratio, low=ratio - 0.1, high=ratio + 0.1)
        timings = [
            BatchTiming(
                batch=index + 1,
                base=stats,
                new=stats,
                speedup=interval,
                cpu_speedup=interval,
                theoretical=1,
                busy=False,
                verdict=verdict,
            )
            for index, verdict in enumerate(verdicts)
        ]
        files = [
            ModelFile(
                path=str(p), sha256="", bytes=p.stat().st_size, macs=1, load_seconds=0, nodes_per_provider={}
            )
            for p in (base, new)
        ]
        return Bench(
            provider="cpu",
            provider_options={},
            threads=1,
            base=files[0],
            new=files[1],
            batches=timings,
            environment=environment(),
        )

    monkeypatch.setattr(quantizing, "benchmark", benchmark)
    monkeypatch.setattr(quantizing, "give_back", lambda work, found, race: found)


@pytest.mark.slow
def test_a_file_that_loses_the_race_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = exported(tmp_path), tmp_path / "model-int8.onnx"
    for verdicts in (["slower"], ["no measurable difference"], ["faster", "slower"]):
        out.write_bytes(b"of an earlier run")
        judged(monkeypatch, *verdicts)
        made = quantize_onnx(path, out, split_of(64))
        assert made.shipped == "float32" and made.path is None and not out.exists()
        assert made.why.startswith(f"at batch 1 8 bit is {verdicts[0]}, 1.50 times as fast (1.40 to 1.60)")
        assert made.why.endswith(": ship the float file")
    for verdicts in (["faster"], ["faster (by CPU time: the machine was busy)", "no measurable difference"]):
        judged(monkeypatch, *verdicts)
        made = quantize_onnx(path, out, split_of(64))
        assert made.shipped == "int8" and made.path == str(out) and out.exists()
        assert made.bench is not None and made.bench.new.path == str(out)
        assert made.bench.new.bytes == made.int8_bytes == out.stat().st_size


@pytest.mark.slow
def test_accuracy_is_a_paired_difference(tmp_path: Path) -> None:
    path, out = exported(tmp_path), tmp_path / "model-int8.onnx"
    test = split_of(50, seed=2)
    (images,) = [x for (x,), _ in test.batches(50)]
    (logits,) = checks.run_all(path.read_bytes(), [{"input": images.numpy()}])[0]
    labelled = split_of(50, torch.from_numpy(logits.argmax(1)), seed=2)
    made = quantize_onnx(path, out, split_of(64), evaluate=labelled, faster_only=False)
    (after,) = checks.run_all(out.read_bytes(), [{"input": images.numpy()}])[0]
    assert made.accuracy is not None
    assert made.accuracy.value == pytest.approx((after.argmax(1) == logits.argmax(1)).mean() - 1)
    with pytest.raises(DataError, match="evaluate"):
        quantize_onnx(path, out, split_of(64), evaluate=split_of(50), faster_only=False)


def test_layers_without_eight_bits_stay_in_float_by_name(tmp_path: Path) -> None:
    turned = nn.ConvTranspose2d(8, 4, 2)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), turned, nn.ReLU(), nn.Conv2d(4, 4, 1))
    path, out = exported(tmp_path, net), tmp_path / "model-int8.onnx"
    made = quantize_onnx(path, out, split_of(64), faster_only=False)
    assert made.in_float == {"2": "the runtime has no 8 bit ConvTranspose for CPUs"}
    assert [layer.name for layer in made.layers] == ["0", "4"]


def test_files_that_cannot_be_quantised_are_refused(tmp_path: Path) -> None:
    path, out = exported(tmp_path), tmp_path / "model-int8.onnx"
    with pytest.raises(DataError, match="samples: found 20"):
        quantize_onnx(path, out, split_of(20))
    with pytest.raises(ExportError, match="grid: found 'fine'"):
        quantize_onnx(path, out, split_of(64), grid="fine")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="the float file itself"):
        quantize_onnx(path, path, split_of(64))
    with pytest.raises(BenchError, match=r"missing\.onnx"):
        quantize_onnx(tmp_path / "missing.onnx", out, split_of(64))
    small = Split(torch.zeros(64), np.arange(64), lambda i: (torch.zeros(len(i), 3, 12),), False)
    with pytest.raises(
        DataError, match="samples of input: found float32 of 3x12, expected float32 of 3x12x12"
    ):
        quantize_onnx(path, out, small)
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("QuantizeLinear", ["output", "scale"], ["q"], "q"))
    model.graph.initializer.append(helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [1.0]))
    again = tmp_path / "again.onnx"
    onnx.save(model, again)
    with pytest.raises(ExportError, match="found QuantizeLinear, expected a float file"):
        quantize_onnx(again, out, split_of(64))
    model = onnx.load(path)
    norm = helper.make_node("BatchNormalization", [model.graph.node[0].output[0], *"abcd"], ["n"], "norm")
    model.graph.node.insert(1, norm)
    for name in "abcd":
        model.graph.initializer.append(helper.make_tensor(name, onnx.TensorProto.FLOAT, [16], [1.0] * 16))
    onnx.save(model, again)
    with pytest.raises(ExportError, match=r"norm: found a batch normalisation .* fold-bn"):
        quantize_onnx(again, out, split_of(64))
    assert not out.exists()


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = exported(tmp_path)
    images = torch.full((64, 3, 12, 12), float("nan"))
    bad = Split(torch.zeros(64), np.arange(64), lambda i: (images[torch.from_numpy(i)],), False)
    with pytest.raises(ExportError, match="found NaN"):
        quantize_onnx(path, tmp_path / "out.onnx", bad)


class Causal(nn.Module):
    """Scores of samples in time behind a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("mask", torch.full((8, 8), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(((q @ k.transpose(1, 2)) / 4 + self.mask).softmax(2) @ v)


def test_what_a_mask_makes_infinite_is_in_float_and_the_mask_holds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(96, 8, 16)
    path, out, again = (tmp_path / f"{name}.onnx" for name in ("float", "int8", "again"))
    export_onnx(trace(Causal().eval(), (x[:1],)), path, batches=(1, 2))
    samples = Split(torch.zeros(96), np.arange(96), lambda i: (x[torch.from_numpy(i)],), False)
    record, choice = quantize_file(path, out, samples, timing=None)
    assert record.snr_db > 25 and math.inf in {high for _, high in choice.ranges.values()}
    decisions, bulk = choice.plan()
    plan = Plan.model_validate_json(Plan(name="quantize", decisions=decisions, bulk=bulk).model_dump_json())
    requantize(path, again, plan)
    assert again.read_bytes() == out.read_bytes()
    late = x[:4].clone()
    late[:, 4:] += 1  # what comes later must not be seen
    found = [run_all(out.read_bytes(), [{"input": y.numpy()}])[0][0] for y in (x[:4], late)]
    np.testing.assert_array_equal(found[0][:, :4], found[1][:, :4])
    assert not np.array_equal(found[0][:, 4:], found[1][:, 4:])


def test_vnni_and_arm_need_no_pairs() -> None:
    assert machine._saturates("avx2", {"avx2"}) and machine._saturates("avx512", {"avx512f"})
    assert not machine._saturates("avx512", {"avx512f", "avx512_vnni"})
    assert not machine._saturates("avx2", {"avx_vnni"}) and not machine._saturates("arm64-neon", set())


@settings(max_examples=30)
@given(arrays(np.bool_, 40), arrays(np.bool_, 40))
def test_paired_differences_know_both_directions(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> None:
    one, other = paired_difference(before, after), paired_difference(after, before)
    assert one.value == pytest.approx(after.mean() - before.mean()) and other.value == -one.value
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert -1 <= one.low < one.high <= 1


def test_a_paired_interval_is_narrower_than_two_apart_and_holds_its_level() -> None:
    """Simulated: 2,000 samples, one in fifty decided otherwise, with equal chances."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        before = rng.random(2000) < 0.9
        flipped = rng.random(2000) < 0.02
        after = np.where(flipped, rng.random(2000) < 0.5, before)
        # Of flipped samples 0.9 were right, half are: the truth is 0.02 (0.5 - 0.9).
        found = paired_difference(before, after)
        held += found.low <= 0.02 * (0.5 - 0.9) <= found.high
        assert found.high - found.low < 0.02
    assert held >= 0.92 * 400


def test_signal_to_noise() -> None:
    signal = [np.array([3.0, 4.0], np.float32)]
    assert checks.snr(signal, [np.array([3.0, 4.5], np.float32)]) == pytest.approx(20)
    assert checks.snr(signal, signal) == float("inf")


@pytest.mark.slow
def test_a_real_race(tmp_path: Path) -> None:
    """No time is asserted, but that what was measured decides."""
    path, out = exported(tmp_path), tmp_path / "model-int8.onnx"
    made = quantize_onnx(path, out, split_of(64), runs=6, seconds=0.1, batches=(1, 2))
    assert made.bench is not None and [t.batch for t in made.bench.batches] == [1, 2]
    assert made.bench.base.macs == made.bench.new.macs > 0
    assert (made.shipped == "int8") == out.exists() == (made.path is not None)
    assert made.given_back and all(row.time > 0 for row in made.given_back)


@pytest.mark.slow
def test_a_plan_writes_the_same_file_without_data(tmp_path: Path) -> None:
    path, out, again = exported(tmp_path), tmp_path / "a.onnx", tmp_path / "b.onnx"
    _, choice = quantize_file(path, out, split_of(64), exclude=["gr*"], timing=None)
    decisions, bulk = choice.plan()
    plan = Plan.model_validate_json(Plan(name="quantize", decisions=decisions, bulk=bulk).model_dump_json())
    requantize(path, again, plan)
    assert again.read_bytes() == out.read_bytes()
    onnx.checker.check_model(str(again), full_check=True)
    nodes = onnx.load(again).graph.node
    assert next(n for n in nodes if n.name == "grouped").input[1] == "grouped.weight"
    again.unlink()
    plain = decisions | {"compensated": []}
    kept = {name: text for name, text in bulk.items() if name not in map("steps of {}".format, choice.steps)}
    steps = {"steps of first.weight": base64.b64encode(zlib.compress(b"\0")).decode()}
    for wrong, message in (
        ({"decisions": {**decisions, "grid": "fine"}}, "none of 8 bits"),
        ({"decisions": {}}, "none of 8 bits"),
        ({"bulk": dict.fromkeys(bulk, "AAAA")}, "none of 8 bits"),
        ({"bulk": {}, "decisions": plain}, "first: found no range"),
        (
            {"bulk": steps | kept, "decisions": {**plain, "compensated": ["first.weight"]}},
            "first: found 1 steps",
        ),
        ({"decisions": {**decisions, "ranges": {}}}, "first: found no range"),
    ):
        with pytest.raises(ExportError, match=message):
            requantize(path, again, plan.model_copy(update=wrong))
    bomb = base64.b64encode(zlib.compress(bytes(1 << 24))).decode()
    with pytest.raises(ExportError, match="more than 1048576 numbers"):
        requantize(path, again, plan.model_copy(update={"bulk": {"x": bomb}, "decisions": plain}))
    other = exported(tmp_path / "other", nn.Sequential(nn.Conv2d(3, 5, 3)))
    with pytest.raises(ExportError, match=r"found other layers than in the plan \(0, "):
        requantize(other, again, plan)
    assert not again.exists()


def test_layers_that_are_excluded_stay_in_float(tmp_path: Path) -> None:
    path, out = exported(tmp_path), tmp_path / "model-int8.onnx"
    made = quantize_onnx(path, out, split_of(64), exclude=["first", "*wise"], faster_only=False)
    assert made.in_float == {"first": "excluded", "depthwise": "excluded"}
    assert [layer.name for layer in made.layers] == ["second", "grouped", "last"]
    with pytest.raises(ExportError, match="exclude: found no layer that 'x' matches, expected one of first"):
        quantize_onnx(path, out, split_of(64), exclude=["x"], faster_only=False)
    with pytest.raises(ExportError, match="found no layer with constant"):
        quantize_onnx(path, out, split_of(64), exclude=["*"], faster_only=False)


class Uneven(Convolutions):
    """One layer spoils it: its taps are lost beside large ones, which read a channel that never fires."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        with torch.no_grad():
            assert self.first.bias is not None
            self.first.bias[0] = -1000.0
            self.second.weight[:, 0] = 50.0


@pytest.mark.slow
@pytest.mark.parametrize(("times", "kept"), [([1.0, 1.0], True), ([1.0, 1.2], False)])
def test_the_worst_layer_goes_back_to_float_first(
    times: list[float], kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = exported(tmp_path, Uneven()), tmp_path / "model-int8.onnx"
    names = ["first", "second", "depthwise", "grouped", "last"]
    raced: list[int] = []

    def race(models: Sequence[bytes], *_: Any) -> list[float]:
        raced.append(len(models))
        return times

    judged(monkeypatch, "faster")
    monkeypatch.setattr(quantizing, "give_back", attempts.give_back)
    monkeypatch.setattr(quantizing, "race", race)
    made = quantize_onnx(path, out, split_of(64))
    rows = made.given_back
    assert [r.alone_db for r in rows] == sorted(r.alone_db for r in rows)
    everything = quantize_onnx(path, tmp_path / "all.onnx", split_of(64), faster_only=False)
    assert rows[0].name == "second" and rows[0].alone_db < rows[1].alone_db - 10
    if not kept:
        assert len(rows) == attempts.MOST_REFUSED and not any(row.kept for row in rows)
        assert made.snr_db == everything.snr_db and not made.in_float
        return
    assert rows[0].kept and made.in_float[rows[0].name].startswith("the outputs are better")
    assert made.snr_db == max(row.snr_db for row in rows if row.kept) > everything.snr_db
    assert len(rows) <= len(names) - 1 and len(raced) == 2 * len(rows)  # each says it twice


class Turned(nn.Module):
    """A layer that has no 8 bit kernel, between layers that have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 3)
        )
        with torch.no_grad():  # one scale for all would lose most of it
            cast(Tensor, self.layers[2].weight)[:, 0] *= 100
            cast(Tensor, self.layers[4].weight)[:, 0] /= 100

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 6, h - 2, w - 2)."""
        y: Tensor = self.layers(x)
        return y


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "exclude", "left"),
    [
        (Uneven, ["second"], ["Conv"]),
        (Uneven, ["second", "last"], ["Conv", "Gemm"]),
        (Turned, [], ["ConvTranspose"]),
    ],
)
def test_what_stays_in_float_is_computed_in_float(
    net: type[nn.Module], exclude: list[str], left: list[str], tmp_path: Path
) -> None:
    """The runtime rounds the weights of layers between bytes by itself, if it can."""
    torch.manual_seed(0)
    path, out = exported(tmp_path, net()), tmp_path / "model-int8.onnx"
    made = quantize_onnx(path, out, split_of(64), exclude=exclude, faster_only=False)
    for op in left:
        assert made.operators.get(op, 0) + made.operators.get(f"Fused{op}", 0) == 1
    model = onnx.load(out)
    feeds = feeds_of(model, split_of(16, seed=3))
    plain = sessions.plain_session(model, [model.graph.output[0].name])
    written = [y for fed in feeds for y in plain(fed).values()]
    fused = [y for batch in checks.run_all(out.read_bytes(), feeds) for y in batch]
    assert checks.snr(written, fused) > 45


@pytest.mark.slow
def test_the_last_layer_yields_numbers_and_no_bytes(tmp_path: Path) -> None:
    """And is compared with itself all the same; a convolution at the end, which cannot, yields bytes."""
    path, out = exported(tmp_path), tmp_path / "model-int8.onnx"
    made = quantize_onnx(path, out, split_of(64), faster_only=False)
    model = onnx.load(out)
    assert model.graph.output[0].name == "output"
    last = next(n for n in model.graph.node if "output" in n.output)
    assert last.op_type == "Gemm" and made.operators["QGemm"] == 1
    assert {layer.name: layer.steps for layer in made.layers}["last"] == 0
    feeds = feeds_of(model, split_of(16, seed=5))
    values = np.concatenate([y[0] for y in checks.run_all(out.read_bytes(), feeds)])
    assert len(np.unique(values)) > 0.9 * values.size  # of at most 256 bytes there would be fewer
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    made = quantize_onnx(exported(tmp_path, net), out, split_of(64), faster_only=False)
    assert made.operators["QLinearConv"] == 2 and "Conv" not in made.operators


def test_a_wrong_last_layer_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a kernel that saturates: half of the numbers that it should yield."""
    path = exported(tmp_path)
    quantize_file(path, tmp_path / "a.onnx", split_of(64), timing=None)
    model, layers = onnx.load(tmp_path / "a.onnx"), find_layers(onnx.load(path))[0]
    feeds = feeds_of(onnx.load(path), split_of(8))[0]
    real = checks.open_session

    class Halved:
        def __init__(self, content: bytes) -> None:
            self.session = self
            self.inner = real(content).session

        def run(self, *arguments: Any) -> Any:
            return [y / 2 if y.dtype == np.float32 else y for y in self.inner.run(*arguments)]

    assert checks.errors_by_layer(model, layers, feeds)["last"] == 0
    monkeypatch.setattr(checks, "open_session", Halved)
    steps = checks.errors_by_layer(model, layers, feeds)
    assert steps["last"] > 50 and max(steps[name] for name in ("first", "second")) <= 1


@pytest.mark.slow
def test_a_time_that_was_chance_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = exported(tmp_path, Uneven()), tmp_path / "model-int8.onnx"
    times = iter([[1.0, 0.9], [1.0, 1.1]] * 9)
    judged(monkeypatch, "faster")
    monkeypatch.setattr(quantizing, "give_back", attempts.give_back)
    monkeypatch.setattr(quantizing, "race", lambda *_: next(times))
    made = quantize_onnx(path, out, split_of(64))
    assert [row.time for row in made.given_back] == [1.1] * attempts.MOST_REFUSED and not made.in_float
