"""What could be said of an 8 bit file and not be so: measures of nothing, counts, other machines."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from graphcomp.data import Data
from graphcomp.errors import DataError, ExportError, PassError
from graphcomp.ir import trace
from graphcomp.onnx import quantize_file, quantize_onnx
from graphcomp.onnx.quantization import checks
from graphcomp.onnx.quantization.layers import find_layers
from graphcomp.passes import Quantize
from graphcomp.pipeline import check_order
from tests.onnx.test_quantization import Convolutions, exported, split_of
from tests.tiny import context, random_data, traced


def test_what_is_no_number_is_no_signal() -> None:
    ones = np.ones(4, np.float32)
    assert checks.snr([ones], [ones]) == math.inf
    for bad in (np.nan, np.inf):
        assert checks.snr([ones], [np.array([1, 1, 1, bad], np.float32)]) == -math.inf


def test_a_file_without_float_outputs_is_not_lossless(tmp_path: Path) -> None:
    """Nothing to compare would be infinitely good."""
    path = exported(tmp_path)
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("ArgMax", ["output"], ["class"], "best", axis=1))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("class", TensorProto.INT64, ["batch", 1]))
    onnx.save(model, path)
    with pytest.raises(ExportError, match="found no float32 output, expected one"):
        quantize_onnx(path, tmp_path / "out.onnx", split_of(64), faster_only=False)


def test_accuracy_of_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    path, labelled = exported(tmp_path, net), split_of(64, torch.arange(64) % 4)
    with pytest.raises(DataError, match="evaluate: found a first output of 16x4x8x8 and labels up to 3"):
        quantize_onnx(path, tmp_path / "out.onnx", split_of(64), evaluate=labelled, faster_only=False)
    few = split_of(64, torch.arange(64))
    with pytest.raises(DataError, match="evaluate: found a first output of 16x10 and labels up to 63"):
        quantize_onnx(
            exported(tmp_path), tmp_path / "out.onnx", split_of(64), evaluate=few, faster_only=False
        )


def test_the_input_is_found_among_stored_weights(tmp_path: Path) -> None:
    """Files of old exporters list what they store among their inputs, in any order."""
    path = exported(tmp_path)
    model = onnx.load(path)
    inputs = list(model.graph.input)
    del model.graph.input[:]
    for stored in model.graph.initializer:
        shape = numpy_helper.to_array(stored).shape
        model.graph.input.append(helper.make_tensor_value_info(stored.name, stored.data_type, shape))
    model.graph.input.extend(inputs)
    onnx.save(model, path)
    made = quantize_onnx(path, tmp_path / "out.onnx", split_of(64), faster_only=False)
    assert len(made.layers) == 5 and made.samples == 48


class Tokens(nn.Module):
    """Reads numbers of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(8, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, words) -> (n, 2)."""
        y: Tensor = self.last(self.words(x).mean(1))
        return y


def test_inputs_that_have_no_range_are_refused_before_any_work() -> None:
    """Whole numbers have one of their own, and nobody rounds them."""
    program = traced(nn.Conv2d(3, 4, 3), 1, 3, 12, 12).to(torch.float64)
    with pytest.raises(PassError, match=r"quantize: found a network that reads torch\.float64, expected"):
        check_order([Quantize()], program, context(named_data()))
    words = trace(Tokens().eval(), torch.zeros(1, 3, dtype=torch.int64))
    check_order([Quantize()], words, context(named_data()))


def named_data() -> Data:
    """Enough samples, that do not say they are random."""
    return replace(random_data(3, 12, 12, samples=64), spec="npz:some.npz")


def signs() -> nn.Module:
    """Weights of which any two neighbours saturate."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.sign() * 0.1)
    return net


def test_what_would_saturate_elsewhere_is_said_wherever_it_is_made(tmp_path: Path) -> None:
    """This machine's kernels may add in int32; depthwise ones add no pairs anywhere."""
    path, out = exported(tmp_path, signs()), tmp_path / "out.onnx"
    made = quantize_onnx(path, out, split_of(64), grid="pairs", faster_only=False)
    assert made.saturating == []
    with pytest.raises(ExportError, match=r"0: found weights whose sums can saturate|use pairs or reduced"):
        quantize_file(path, out, split_of(64), grid="plain", own="pairs", timing=None)


def test_a_layer_that_is_not_fused_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has 8 bit weights and is computed in float."""
    monkeypatch.setattr(checks, "census", lambda *_: ({}, ["first"]))
    data = context(named_data())
    program = trace(Convolutions().eval(), torch.randn(1, 3, 12, 12))
    planned = Quantize().plan(program, data)
    out = tmp_path / "out.onnx"
    plan, made = Quantize(exclude=("last",)).export(program, exported(tmp_path), out, planned, data, None)
    assert set(made.in_float) == {"first", "last"} and len(made.layers) == 4
    assert plan.summary.startswith("3 of 5 layers in 8 bits, ") and plan.summary.endswith("; no race was run")


def test_part_of_a_step_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of numbers at the end; and a step is one of samples, not of the extremes, which span more."""
    quantize_file(exported(tmp_path), out := tmp_path / "a.onnx", split_of(64), timing=None)
    model, layers = onnx.load(out), find_layers(onnx.load(tmp_path / "model.onnx"))[0]
    feeds = {"input": next(iter(split_of(8).batches(8)))[0][0].numpy()}
    real, off = checks.open_session, 0.0
    spans: list[float] = []

    class Off:
        def __init__(self, content: bytes) -> None:
            self.session, self.inner = self, real(content).session

        def run(self, *arguments: object) -> object:
            found = self.inner.run(*arguments)
            if found[0].dtype == np.float32:
                spans.append(float(np.ptp(found[0])))
                found[0] = found[0] + np.float32(off)
            return found

    monkeypatch.setattr(checks, "open_session", Off)
    assert checks.errors_by_layer(model, layers, feeds)["last"] == 0
    assert max(spans) > 1.5 * spans[0]
    off = 1.5 * spans[0] / 255
    assert checks.errors_by_layer(model, layers, feeds)["last"] == 2


def test_a_file_of_which_no_layer_is_rounded_has_none_to_compare(tmp_path: Path) -> None:
    """As other quantizers write them: nothing is asked of the runtime."""
    layers, _ = find_layers(onnx.load(exported(tmp_path)))
    feeds = {"input": next(iter(split_of(8).batches(8)))[0][0].numpy()}
    assert checks.errors_by_layer(onnx.load(tmp_path / "model.onnx"), layers, feeds) == {}
