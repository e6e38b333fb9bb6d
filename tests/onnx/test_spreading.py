"""Channels in front of depthwise convolutions: exact in float, finer in 8 bits, and left alone elsewhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn

from graphcomp.errors import ExportError
from graphcomp.onnx import quantize_file, requantize
from graphcomp.onnx.quantization import quantize as quantizing
from graphcomp.onnx.quantization.checks import run_all, snr
from graphcomp.onnx.quantization.layers import find_layers
from graphcomp.onnx.quantization.spreading import Factors, find_factors, spread
from graphcomp.records import Plan
from tests.onnx.test_quantization import exported, feeds_of, split_of


class Uneven(nn.Module):
    """Channels of very different size in front of a depthwise layer, which makes up for that."""

    def __init__(self, between: nn.Module, *, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.between, self.twice = nn.Conv2d(3, 16, 1), between, twice
        self.wise, self.last = nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 4, 1)
        size = torch.logspace(0, -1.5, 16)
        with torch.no_grad():
            for parameter in self.make.parameters():
                parameter.mul_(size.reshape(-1, *[1] * (parameter.ndim - 1)))
            self.wise.weight.div_(size.reshape(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 4, h - 2, w - 2)."""
        x = self.between(self.make(x))
        y: Tensor = self.last(self.wise(x).relu())
        return y + x.mean() if self.twice else y


def factors_in(model: ModelProto) -> list[str]:
    return list(find_factors(model, find_layers(model)[0], feeds_of(model, split_of(32))))


@pytest.mark.parametrize("between", [nn.ReLU(), nn.ReLU6(), nn.Identity()], ids=["relu", "relu6", "nothing"])
def test_channels_peak_alike_and_the_network_is_what_it_was(between: nn.Module, tmp_path: Path) -> None:
    """Also where a Clip cuts: no sample is beyond its channel's peak."""
    model = onnx.load(exported(tmp_path, Uneven(between)))
    before, layers, feeds = model.SerializeToString(), find_layers(model)[0], feeds_of(model, split_of(32))
    factors = find_factors(model, layers, feeds)
    made, found = spread(model, layers, factors)
    assert model.SerializeToString() == before and [x.name for x in found] == [x.name for x in layers]
    (factor,) = factors.values()
    assert factor.min() == 1 and factor.max() > 5
    peaks = find_factors(made, found, feeds)
    assert np.allclose(next(iter(peaks.values())), 1, atol=1e-5)
    pairs = zip(run_all(before, feeds), run_all(made.SerializeToString(), feeds), strict=True)
    assert all(np.allclose(a[0], b[0], rtol=1e-4, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize(
    "net",
    [
        Uneven(nn.Hardswish()),
        Uneven(nn.Hardtanh(-1, 1)),
        Uneven(nn.ReLU(), twice=True),
        nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4)),
        nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.ReLU()),
    ],
    ids=["hardswish", "clip below 0", "two readers", "grouped", "the input"],
)
def test_others_are_left_alone(net: nn.Module, tmp_path: Path) -> None:
    assert factors_in(onnx.load(exported(tmp_path, net))) == []


@pytest.mark.slow
def test_8_bits_are_better_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported(tmp_path, Uneven(nn.ReLU6()))
    model, out = onnx.load(path), tmp_path / "out.onnx"
    feeds = feeds_of(model, split_of(64, seed=1))
    expected = [y for batch in run_all(path.read_bytes(), feeds) for y in batch]

    def decibels() -> float:
        record, _ = quantize_file(path, out, split_of(128), timing=None)
        assert all((layer.steps or 0) <= 1 and (layer.snr_db or 0) > 15 for layer in record.layers)
        return snr(expected, [y for batch in run_all(out.read_bytes(), feeds) for y in batch])

    better = decibels()
    monkeypatch.setattr(quantizing, "find_factors", lambda *_: {})
    assert better > decibels() + 3


@pytest.mark.slow
def test_a_plan_holds_the_factors(tmp_path: Path) -> None:
    path, out, again = exported(tmp_path, Uneven(nn.ReLU())), tmp_path / "a.onnx", tmp_path / "b.onnx"
    _, choice = quantize_file(path, out, split_of(64), timing=None)
    decisions, bulk = choice.plan()
    plan = Plan.model_validate_json(Plan(name="quantize", decisions=decisions, bulk=bulk).model_dump_json())
    requantize(path, again, plan)
    assert again.read_bytes() == out.read_bytes()
    (name,) = decisions["spread"]
    short = choice.factors[name][:3]

    def changed(factors: Factors) -> dict[str, Any]:
        return dict(zip(("decisions", "bulk"), replace(choice, factors=factors).plan(), strict=True))

    for wrong, message in (
        ({"bulk": {k: v for k, v in bulk.items() if not k.startswith("factors")}}, "none of 8 bits"),
        (changed({name: short}), "its 3 factors"),
        (changed({"x": short}), "x: found no depth"),
    ):
        with pytest.raises(ExportError, match=message):
            requantize(path, again, plan.model_copy(update=wrong))
