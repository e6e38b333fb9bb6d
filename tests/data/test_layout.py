"""Networks that take images with their channels last get the same images, read, augmented and damaged."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

from graphcomp.compiler.source import load_source, open_data
from graphcomp.data import Data, augmented, find_augmentation, load_data
from graphcomp.data.layout import in_front, is_channels_last
from graphcomp.ir import trace
from graphcomp.measure import Corruption, robustness
from graphcomp.onnx import export_onnx, read_onnx

PLANES, LAST = (3, 12, 10), (12, 10, 3)


def test_which_shapes_have_their_channels_last() -> None:
    assert [is_channels_last(s) for s in (LAST, (12, 10, 1))] == [True, True]
    assert not any(
        map(is_channels_last, (PLANES, (1, 12, 3), (3, 12, 3), (64, 8, 8), (12, 3), (1, 12, 10, 3)))
    )
    assert in_front(LAST) == PLANES == in_front(PLANES)


@pytest.fixture(params=["imagefolder", "npz"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Data, Data]:
    pixels = np.random.default_rng(0).integers(0, 255, (12, *LAST), dtype=np.uint8)
    if request.param == "npz":
        np.savez(tmp_path / "x.npz", x=pixels, y=np.arange(12) % 2)
        spec = f"npz:{tmp_path}/x.npz"
    else:
        for i, image in enumerate(pixels):
            (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / f"{i % 2}" / f"{i}.png")
        spec = f"imagefolder:{tmp_path}"
    planes, last = (load_data(spec, input_shape=shape, seed=0) for shape in (PLANES, LAST))
    return planes, last


def test_samples_are_the_same(both: tuple[Data, Data]) -> None:
    planes, last = both
    for one, other in ((planes.train, last.train), (planes.eval, last.eval)):
        (((x,), y), ((z,), w)) = (next(iter(s.batches(12))) for s in (one, other))
        assert z.is_contiguous() and z.shape[1:] == LAST
        assert torch.equal(x, z.permute(0, 3, 1, 2)) and torch.equal(y, w)


@pytest.mark.parametrize("name", ["cifar", "imagenet"])
def test_augmentation_is_of_the_image(both: tuple[Data, Data], name: str) -> None:
    planes, last = (find_augmentation(name, "", [shape], 2) for shape in (PLANES, LAST))  # type: ignore[arg-type]
    ((x,), _), ((z,), _) = (next(iter(d.train.batches(6))) for d in both)
    random = np.random.default_rng(0).random((len(x), planes.numbers))
    assert planes.numbers == last.numbers
    assert torch.equal(planes(x, random), augmented(last, (z,), random)[0].permute(0, 3, 1, 2))
    assert not torch.equal(planes(x, random), x)


class Last(nn.Module):
    def __init__(self, planes: nn.Module) -> None:
        super().__init__()
        self.planes = planes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.planes(x.permute(0, 3, 1, 2))


def test_damage_is_of_the_image(both: tuple[Data, Data]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(640, 2)).eval()
    programs = trace(net, torch.randn(1, *PLANES)), trace(Last(net), torch.randn(1, *LAST))
    kinds = [Corruption("motion-blur", 3.0), Corruption("occlusion", 0.5), Corruption("brightness", 0.4)]
    found = [robustness(p, d.eval, kinds) for p, d in zip(programs, both, strict=True)]
    assert [row.score for row in found[0]] == [row.score for row in found[1]]


def test_a_file_with_channels_last_is_evaluated_as_the_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1800, 10)).eval()
    export_onnx(trace(net, torch.randn(1, 3, 32, 32)), tmp_path / "planes.onnx")
    model = onnx.load(tmp_path / "planes.onnx")
    model.graph.node.insert(0, helper.make_node("Transpose", ["nhwc"], ["input"], perm=[0, 3, 1, 2]))
    del model.graph.input[:]
    model.graph.input.append(helper.make_tensor_value_info("nhwc", TensorProto.FLOAT, ["n", 32, 32, 3]))
    onnx.save(model, tmp_path / "last.onnx")
    assert read_onnx(tmp_path / "last.onnx").example_inputs[0].shape == (1, 32, 32, 3)
    scores = []
    for name in ("planes", "last"):
        source = load_source(str(tmp_path / f"{name}.onnx"))
        data = open_data("digits?limit=60", source.program, 0)
        (x,), _ = next(iter(data.eval.batches(60)))
        with torch.no_grad():
            scores.append(source.program(x))
    torch.testing.assert_close(scores[0], scores[1])
