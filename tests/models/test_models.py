"""Golden counts of the papers' networks, and the bundled weights."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, fx, nn

from graphcomp.compiler.checkpoints import load_weights
from graphcomp.data.sources import load_data
from graphcomp.models import MODELS
from graphcomp.models.preact_resnet import PreActResNet
from graphcomp.models.resnet_cifar import PaddedShortcut, ResNet
from graphcomp.models.train_digits import SHIFT, accuracy, shifted
from graphcomp.models.vgg_cifar import VGG16

PARAMETERS = {
    "quick": 75_290,
    "quick-pose": 74_835,
    "resnet50-pose": 23_514_179,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet20-b": 272_474,
    "resnet32-b": 466_906,
    "resnet44-b": 661_338,
    "resnet56-b": 855_770,
    "resnet110-b": 1_730_714,
    "resnet56-cifar100": 858_868,
    "preact-resnet164": 1_703_258,
    "preact-resnet164-cifar100": 1_726_388,
    "vgg16-cifar": 14_991_946,
    "vgg16-cifar-single": 14_728_266,
    "vgg16-cifar100": 15_038_116,
    "simple-cnn": 1_372_254,
    "simple-cnn-cifar100": 1_389_804,
    "mobilenet-v2-cifar": 2_236_682,
    "densenet-cifar": 605_802,
    "resnet20-digits": 269_722,
}
MACS = {
    "resnet20": 40_551_040,
    "resnet56": 125_485_696,
    "resnet110": 252_887_680,
    "resnet56-b": 125_747_840,
    "resnet56-cifar100": 125_491_456,
    "vgg16-cifar": 313_463_808,
    "vgg16-cifar-single": 313_201_664,
    "vgg16-cifar100": 313_509_888,
    "simple-cnn": 281_174_016,
    "simple-cnn-cifar100": 282_279_936,
}


def macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d | nn.Linear):
            total += module.weight.numel() * output[0, 0].numel()

    model = model.to("meta").eval()
    for module in model.modules():
        module.register_forward_hook(count)
    model(torch.empty(1, *shape, device="meta"))
    return total


def test_every_model_has_a_golden_count():
    assert set(MODELS) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_g0_parameters(name):
    assert sum(p.numel() for p in MODELS[name].factory().parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", MACS)
def test_g0_macs(name):
    assert macs(MODELS[name].factory(), MODELS[name].input_shape) == MACS[name]


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet20-b", "vgg16-cifar", "vgg16-cifar-single", "simple-cnn"]
)
def test_a_trace_computes_the_same(name):
    torch.manual_seed(0)
    model = MODELS[name].factory().eval()
    x = torch.randn(2, *MODELS[name].input_shape)
    with torch.inference_mode():
        assert torch.equal(fx.symbolic_trace(model)(x), model(x))


def test_option_a_slices_and_pads_half_on_each_side():
    x = torch.randn(2, 4, 5, 6)
    y = PaddedShortcut(2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_names_are_those_of_published_checkpoints():
    keys = set(ResNet(20, "B").state_dict())
    assert {"conv1.weight", "bn1.weight", "layer1.2.bn2.running_mean", "linear.bias"} <= keys
    assert {"layer2.0.shortcut.0.weight", "layer3.0.shortcut.1.weight"} <= keys
    assert not any("shortcut" in k for k in ResNet(20, "A").state_dict())


@pytest.mark.parametrize("make", [lambda: ResNet(21), lambda: ResNet(20, "C"), lambda: VGG16("three")])
def test_an_unknown_variant_is_refused(make):
    with pytest.raises(ValueError, match=r"found .*, expected .*; use"):
        make()


def test_bundled_weights_are_small_and_say_what_they_are():
    path = MODELS["resnet20-digits"].weights
    assert path is not None
    assert path.stat().st_size <= 1_500_000
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert {"top1", "seed", "epochs", "torch", "numpy", "scikit-learn"} <= set(metadata)


@pytest.mark.slow
def test_bundled_weights_reach_the_accuracy_they_claim():
    spec = MODELS["resnet20-digits"]
    assert spec.weights is not None and spec.data is not None
    model = spec.factory().eval()
    load_weights(model, spec.weights)
    data = load_data(spec.data, input_shape=spec.input_shape, seed=0)
    top1 = accuracy(model, data.eval)
    with safe_open(spec.weights, "pt") as file:
        claimed = float(file.metadata()["top1"])
    assert top1 >= 0.98
    assert top1 == pytest.approx(
        claimed, abs=1.5 / len(data.eval)
    )  # one sample for another machine's rounding


def test_shift_moves_whole_images_within_the_limit():
    import numpy as np

    image = torch.arange(64.0).view(1, 1, 8, 8)
    inside = image[0, 0, SHIFT:-SHIFT, SHIFT:-SHIFT]
    moved = shifted(image.expand(50, -1, -1, -1), np.random.RandomState(0))
    assert moved.shape == (50, 1, 8, 8)
    found = {
        (dy, dx)
        for m in moved
        for dy in range(2 * SHIFT + 1)
        for dx in range(2 * SHIFT + 1)
        if torch.equal(m[0, dy : dy + 4, dx : dx + 4], inside)
    }
    assert len(found) > 10


DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not (DATA / "weights").is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize(("depth", "file"), [(20, "resnet20-12fca82f.th"), (56, "resnet56-4bfd9763.th")])
def test_published_weights_classify_cifar10(depth, file):
    import numpy as np
    from PIL import Image

    model = ResNet(depth).eval()
    load_weights(model, DATA / "weights" / file)
    with Image.open(DATA / "cifar10" / "test_000.webp") as column:
        pixels = np.asarray(column.convert("RGB")).reshape(-1, 32, 32, 3)[:200]
    labels = torch.from_numpy(np.load(DATA / "cifar10" / "test_labels.npy")[:200].astype(np.int64))
    x = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    with torch.inference_mode():
        correct = (model(x).argmax(1) == labels).sum()
    assert correct >= 0.88 * len(labels)


def test_pre_activation():
    """The trunk is neither normalised nor activated, and a shortcut that changes the width is one product."""
    torch.manual_seed(0)
    model = PreActResNet(11).eval()
    block = model.layer2[0]
    assert isinstance(block.shortcut, nn.Conv2d) and model.layer1[0].shortcut is not None
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(fx.symbolic_trace(model)(x), model(x))
        block.conv3.weight.zero_()
        y = torch.randn(2, 64, 4, 4)
        assert torch.equal(block(y), block.shortcut(block.bn1(y).relu()))
    with pytest.raises(ValueError, match="depth: found 12, expected 9n"):
        PreActResNet(12)
