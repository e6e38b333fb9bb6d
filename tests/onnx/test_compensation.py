"""Weights that make up for each other: against least squares, within what pairs allow, and what is read."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from graphcomp.errors import ExportError
from graphcomp.measure import Moments
from graphcomp.onnx.quantization import compensation, grids, qdq
from graphcomp.onnx.quantization.checks import run_all, snr
from graphcomp.onnx.quantization.grids import Grid
from graphcomp.onnx.quantization.layers import Layer, find_layers
from graphcomp.onnx.quantization.qdq import Choice, compensate, rounded_weights, write_qdq
from graphcomp.onnx.quantization.ranges import Histogram, collect
from graphcomp.onnx.quantization.sessions import plain_session
from graphcomp.onnx.subgraphs import count_reads
from tests.onnx.test_quantization import Convolutions, exported, feeds_of, split_of


def one_node(op: str, weight: tuple[int, ...], x: tuple[int, ...], **attributes: Any) -> onnx.ModelProto:
    """A file with one layer of random weights."""
    values = np.random.default_rng(0).standard_normal(weight).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], "layer", **attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


LAYERS = {
    "1x1": one_node("Conv", (4, 6, 1, 1), (2, 6, 5, 5)),
    "strided": one_node("Conv", (4, 3, 3, 2), (2, 3, 7, 7), strides=[2, 1], pads=[1, 0, 2, 1]),
    "dilated": one_node("Conv", (4, 3, 3, 3), (2, 3, 8, 8), dilations=[2, 1]),
    "grouped": one_node("Conv", (4, 3, 3, 3), (2, 6, 6, 6), group=2, pads=[1, 1, 1, 1], strides=[2, 2]),
    "depthwise": one_node("Conv", (4, 1, 3, 3), (2, 4, 6, 6), group=4),
    "same upper": one_node("Conv", (4, 3, 2, 3), (2, 3, 6, 5), auto_pad="SAME_UPPER", strides=[2, 1]),
    "same lower": one_node("Conv", (4, 3, 2, 3), (2, 3, 6, 5), auto_pad="SAME_LOWER", strides=[2, 1]),
    "valid": one_node("Conv", (4, 3, 2, 2), (2, 3, 5, 5), auto_pad="VALID"),
    "a line": one_node("Conv", (4, 3, 3), (2, 3, 9), pads=[1, 1]),
    "a volume": one_node("Conv", (4, 3, 2, 2, 2), (2, 3, 3, 3, 4)),
    "gemm": one_node("Gemm", (6, 4), (2, 6)),
    "gemm, turned": one_node("Gemm", (4, 6), (2, 6), transB=1),
    "matmul": one_node("MatMul", (6, 4), (2, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_layer_reads_times_its_weight_is_what_it_makes(name: str) -> None:
    """All positions of these small outputs are looked at. Rows are in the order of the weight."""
    model = LAYERS[name]
    ((layer,), _), shape = (
        find_layers(model),
        [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim],
    )
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    y = plain_session(model, ["y"])({"x": x})["y"]
    rows = compensation._rows(layer, model.graph.node[0], torch.from_numpy(x), 0)
    weight = layer.values if layer.axis == 0 else layer.values.T
    blocks = torch.tensor(weight.reshape(layer.groups, -1, rows.shape[2]))
    made = torch.einsum("ngk,gok->ngo", rows, blocks).flatten(1).numpy()
    expected = (
        y.reshape(-1, y.shape[-1]) if layer.channels_last else np.moveaxis(y, 1, -1).reshape(-1, y.shape[1])
    )
    assert np.allclose(made, expected, atol=1e-5)
    assert (layer.weight_of(layer.taps()) == layer.values).all()


def some_layer(out: int, inner: int, kernel: int, groups: int, seed: int) -> tuple[Layer, Moments]:
    """Weights, and correlated samples that they read."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((out, inner, kernel)).astype(np.float32)
    taps = inner * kernel
    mixed = rng.standard_normal((200, groups, taps)) @ rng.standard_normal((groups, taps, taps)).mean(0)
    rows = torch.from_numpy(mixed.astype(np.float32)) + 3
    moments = Moments(rows[:8].mean(0), rows.new_zeros(groups, 0))
    moments.add(rows, rows.new_zeros(len(rows), groups, 0))
    return Layer("layer", "Conv", "x", "y", "w", 0, values, None, groups=groups), moments


def rounded(
    layer: Layer, moments: Moments, scale: NDArray[np.float32], largest: int, pairs: bool
) -> NDArray[np.int8]:
    """With sums of its own, which are used up."""
    return compensation.rounded(layer, copy.deepcopy(moments), scale, largest, pairs=pairs)


def quadratic(layer: Layer, moments: Moments) -> NDArray[np.float64]:
    """C + ridge (groups, taps, taps), taps as kernels add them."""
    order = np.arange(layer.taps().shape[1]).reshape(layer.values.shape[1], -1).T.ravel()
    gram = copy.deepcopy(moments).centred().gram.numpy()[:, order][:, :, order]
    level = compensation.RIDGE * np.trace(gram, axis1=1, axis2=2) / gram.shape[1]
    return np.asarray(gram + level[:, None, None] * np.eye(gram.shape[1]))


@pytest.mark.parametrize("sizes", [(4, 5, 3, 1), (6, 3, 2, 2), (3, 1, 9, 3), (2, 70, 2, 1)], ids=str)
def test_every_tap_is_the_nearest_to_what_least_squares_asks_for(sizes: tuple[int, int, int, int]) -> None:
    """Of the errors in front of a tap and its own, given those behind it, the least are solved for anew."""
    layer, moments = some_layer(*sizes, seed=0)
    scale = grids.scales(layer.taps(), "plain") * 8
    found = rounded(layer, moments, scale, 127, pairs=False).astype(np.float64)
    lost = (layer.taps() - found * scale[:, None]).reshape(layer.groups, -1, found.shape[1])
    for group, matrix in enumerate(quadratic(layer, moments)):
        for row, errors in enumerate(lost[group]):
            channel = group * lost.shape[1] + row
            for k in range(len(errors)):
                free = -np.linalg.solve(matrix[: k + 1, : k + 1], matrix[: k + 1, k + 1 :] @ errors[k + 1 :])
                aim = (layer.taps()[channel, k] - free[k]) / scale[channel]
                assert abs(found[channel, k] - aim) <= 0.5 + 1e-4


@given(
    st.integers(0, 10_000),
    st.sampled_from(["pairs", "plain", "reduced"]),
    st.sampled_from([(3, 5, 3), (2, 4, 1)]),
)
def test_weights_stay_on_their_grid(seed: int, grid: Grid, sizes: tuple[int, int, int]) -> None:
    layer, moments = some_layer(*sizes, 1, seed)
    scale = grids.scales(layer.taps(), grid)
    found = compensation.rounded(
        layer, copy.deepcopy(moments), scale, grids.LARGEST[grid], pairs=grid == "pairs"
    )
    assert grid == "plain" or not grids.saturates(found).any()
    assert np.abs(found.astype(np.int16)).max() <= grids.LARGEST[grid]


@pytest.mark.parametrize("grid", ["pairs", "plain", "reduced"])
def test_outputs_change_less_than_by_the_nearest(grid: Grid) -> None:
    """Greedily: not in every draw."""
    better = nearest = 0.0
    for seed in range(8):
        layer, moments = some_layer(8, 12, 3, 1, seed)
        scale, matrix = grids.scales(layer.taps(), grid), quadratic(layer, moments)[0]
        found = compensation.rounded(
            layer, copy.deepcopy(moments), scale, grids.LARGEST[grid], pairs=grid == "pairs"
        )
        changes = []
        for steps in (found, grids.quantised(layer.taps(), scale)):
            lost = layer.taps().astype(np.float64) - steps * scale.astype(np.float64)[:, None]
            changes.append(np.einsum("ok,kl,ol->", lost, matrix, lost))
        better, nearest = better + changes[0], nearest + changes[1]
    assert better < 0.8 * nearest


def choice_for(model: onnx.ModelProto, layers: list[Layer], feeds: list[dict[str, Any]]) -> Choice:
    statistics = collect(model, layers, feeds)
    names = tuple(layer.name for layer in layers)
    return Choice("pairs", None, statistics.ranges(), statistics.means, names)


def test_outputs_keep_more_and_the_file_has_these_weights(tmp_path: Path) -> None:
    model = onnx.load(exported(tmp_path))
    layers, feeds = find_layers(model)[0], feeds_of(model, split_of(64))
    nearest = choice_for(model, layers, feeds)
    better = compensate(model, layers, nearest, feeds)
    made = {
        name: write_qdq(model, layers, choice) for name, choice in (("near", nearest), ("better", better))
    }
    for choice, one in zip((nearest, better), made.values(), strict=True):
        stored = {i.name: numpy_helper.to_array(i) for i in one.graph.initializer}
        assert stored.keys() <= count_reads(one).keys()  # runtimes warn of what nothing reads
        weights = rounded_weights(model, layers, choice, qdq.scales_of(layers, choice.ranges, "pairs"))
        for layer in layers:
            assert (layer.taps(stored[layer.weight + "_quantized"]) == weights[layer.weight]).all()
    expected = [y[0] for y in run_all(model.SerializeToString(), feeds)]
    decibels = {
        name: snr(expected, [y[0] for y in run_all(m.SerializeToString(), feeds)]) for name, m in made.items()
    }
    assert decibels["better"] > decibels["near"]


def test_a_weight_that_something_else_reads_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    model = onnx.load(exported(tmp_path))
    layers, feeds = find_layers(model)[0], feeds_of(model, split_of(32))
    choice = compensate(model, layers, choice_for(model, layers, feeds), feeds)
    layer = layers[0]
    scales = qdq.scales_of(layers, choice.ranges, "pairs")
    nearest = grids.quantised(layer.taps(), scales[layer.weight])
    assert (rounded_weights(model, layers, choice, scales)[layer.weight] != nearest).any()
    model.graph.node.append(helper.make_node("Identity", [layer.weight], ["also"]))
    assert (rounded_weights(model, layers, choice, scales)[layer.weight] == nearest).all()


def test_steps_beyond_eight_bits_are_refused(tmp_path: Path) -> None:
    model = onnx.load(exported(tmp_path))
    layers, feeds = find_layers(model)[0], feeds_of(model, split_of(8))
    choice = choice_for(model, layers, feeds)
    beyond = {layers[0].weight: np.full(layers[0].taps().shape, 120, np.int8)}
    with pytest.raises(ExportError, match=r"first: found .* that lead beyond 8 bits"):
        write_qdq(model, layers, replace(choice, steps=beyond))


def test_sums_that_memory_does_not_hold_take_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result; a layer that has too many alone is left out."""
    model = onnx.load(exported(tmp_path, Convolutions()))
    layers, feeds = find_layers(model)[0], feeds_of(model, split_of(16))
    scales = qdq.scales_of(layers, choice_for(model, layers, feeds).ranges, "pairs")
    whole = compensation.compensated(model, layers, scales, "pairs", feeds)
    monkeypatch.setattr(compensation, "MEMORY", 12 * 144**2)
    parts = compensation.compensated(model, layers, scales, "pairs", feeds)
    assert whole.keys() == parts.keys() and all((whole[name] == parts[name]).all() for name in whole)
    monkeypatch.setattr(compensation, "MEMORY", 12 * 144**2 - 1)
    assert whole.keys() - compensation.compensated(model, layers, scales, "pairs", feeds).keys() == {
        "second.weight"
    }


def test_means_of_samples_are_what_they_say() -> None:
    values = np.random.default_rng(0).standard_normal((12, 3, 5)).astype(np.float32)
    values[3] *= 100
    histogram = Histogram()
    histogram.add(values[:8], 8)
    histogram.add(values[8:], 4)
    low, high = histogram.range("mean")
    assert low == pytest.approx(values.min((1, 2)).mean()) and high == pytest.approx(
        values.max((1, 2)).mean()
    )
