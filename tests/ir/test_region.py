"""A part of a network, and the network with the smaller part in it, on a detector with both of its ends."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

import graphcomp
from graphcomp.channels import analyse
from graphcomp.errors import SurgeryError, TraceError
from graphcomp.ir import PASS_KEY, Program, fresh_inputs, output_tensors
from graphcomp.pipeline import relative_error
from tests.nets import scramble
from tests.removing import half, random_scores


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Conv2d(16, 3, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, features: list[Tensor]) -> dict[str, list[Tensor]]:
        return {"scores": [self.scores(x) for x in features], "boxes": [self.boxes(x) for x in features]}


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 1))
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        x = x + self.branch(x)
        return [x, self.down(x)]


class Detector(nn.Module):
    """Images of any size in, boxes above a threshold out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.backbone, self.head = Backbone(), Head()
        self.threshold = 0.0

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        size = max(int(x.shape[-1] * (2 if float(x.abs().max()) > 1e9 else 1)) for x in images)
        batch = torch.zeros(len(images), 3, size, size)
        for i, image in enumerate(images):
            batch[i, :, : image.shape[-2], : image.shape[-1]].copy_((image * self.scale).detach())
        found = self.head(self.backbone(batch))
        return [self._boxes(found, i) for i in range(len(images))]

    def _boxes(self, found: dict[str, list[Tensor]], i: int) -> Tensor:
        kept = []
        for scores, boxes in zip(found["scores"], found["boxes"], strict=True):
            best = scores[i].amax(0).flatten()
            kept.append(boxes[i].flatten(1).T[best > self.threshold])
        return torch.cat(kept)


IMAGES = [torch.rand(3, 20, 24), torch.rand(3, 16, 16)]


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    model = Detector()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)  # type: ignore[arg-type]
    return model.eval()


def traced(detector: nn.Module, start: str = "backbone", until: str = "head") -> graphcomp.Program:
    return graphcomp.trace(detector, (IMAGES,), start=start, until=until)


def test_the_part_computes_what_the_network_does_there(detector: Detector) -> None:
    program = traced(detector)
    (x,) = fresh_inputs(program, 3, seed=1)
    wanted = detector.head(detector.backbone(x))
    for a, b in zip(output_tensors(program(x)), output_tensors(wanted), strict=True):
        torch.testing.assert_close(a, b)
    assert (program.interface.start, program.interface.until) == ("backbone", "head")
    assert "backbone.stem.0" in program.called_modules()
    assert "from the call of backbone to what head returns" in program.interface.remarks[0]


def test_batch_and_sizes_stay_open(detector: Detector) -> None:
    program = traced(detector)
    assert not program.interface.specialised
    x = torch.randn(2, 3, 40, 28)
    for a, b in zip(
        output_tensors(program(x)), output_tensors(detector.head(detector.backbone(x))), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_until_alone_keeps_the_inputs() -> None:
    model = torchvision.models.resnet18(weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    program = graphcomp.trace(model, x, until="layer2")
    features = nn.Sequential(*list(model.children())[:6])
    torch.testing.assert_close(program(x), features(x))


def test_tensors_of_a_call_are_inputs_in_its_order_and_names() -> None:
    class Two(nn.Module):
        def forward(self, pair: list[Tensor], scale: float, *, extra: Tensor) -> Tensor:
            return (pair[0] - pair[1]) * scale + extra

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        def forward(self, x: Tensor) -> Tensor:
            return self.two([x, 2 * x], 0.5, extra=x + 1)

    program = graphcomp.trace(Net(), torch.randn(1, 4), start="two", until="two")
    assert [n.name for n in program.graph.nodes if n.op == "placeholder"] == ["pair", "pair_1", "extra"]
    a, b, c = torch.randn(3, 2, 4).unbind()
    torch.testing.assert_close(program(a, b, c), (a - b) * 0.5 + c)


def test_named_tuples_are_gone_through() -> None:
    class Pyramid(NamedTuple):
        large: Tensor
        small: Tensor

    class Sum(nn.Module):
        def forward(self, maps: Pyramid) -> Tensor:
            return maps.large + maps.small

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sum = Sum()

        def forward(self, x: Tensor) -> Tensor:
            return self.sum(Pyramid(x, 2 * x))

    program = graphcomp.trace(Net(), torch.randn(1, 4), start="sum", until="sum")
    a, b = torch.randn(2, 3, 4).unbind()
    torch.testing.assert_close(program(a, b), a + b)


def test_a_call_without_samples_is_traced_for_one(detector: Detector) -> None:
    """A head that runs on boxes that were found, where none was."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x[x.sum(1) > 1e9])

    program = graphcomp.trace(Net(), torch.randn(3, 4), start="head", until="head")
    assert program.example_inputs[0].shape == (1, 4)


@pytest.mark.parametrize(
    ("start", "until", "said"),
    [
        (
            "backbone",
            "nose",
            r"until: found 'nose', expected the path of a module of Detector, e.g. backbone",
        ),
        ("bone", "head", r"start: found 'bone', expected the path"),
        ("backbone.unused", "head", r"start: found no call of backbone.unused"),
        ("head", "backbone", r"until: found no call of backbone behind head"),
        ("", "head", r"example_inputs: found list for input 0, expected one tensor an input"),
    ],
)
def test_what_is_no_part_is_refused(detector: Detector, start: str, until: str, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        traced(detector, start, until)


def test_no_hook_stays_behind(detector: Detector) -> None:
    traced(detector)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in detector.modules())


def test_inputs_that_the_network_does_not_take_are_named(detector: Detector) -> None:
    with pytest.raises(TraceError, match=r"start: found TypeError.* on the way to backbone"):
        graphcomp.trace(detector, (3.5,), start="backbone", until="head")


def test_a_part_is_saved_and_loaded(detector: Detector, tmp_path: Any) -> None:
    program = traced(detector)
    graphcomp.save(program, tmp_path / "part")
    assert graphcomp.load(tmp_path / "part").interface == program.interface


PASSES = [
    "l1{ratio=0.5, multiple=1}",
    "fold-bn, l1{ratio=0.5, multiple=1}",
    "fold-bn, l1{ratio=0.5, multiple=1}, low-rank{ratio=0.5, multiple=1}",
    "dct{rate=2, min_weights=1}",
]


@pytest.mark.parametrize("passes", PASSES)
def test_the_network_runs_with_the_smaller_part(detector: Detector, passes: str) -> None:
    """Its own class; between its ends what the program computes, and its own code around it."""
    detector.backbone.branch.train()
    try:
        small = graphcomp.compile(traced(detector), passes, allow_nothing=True).program
        made = graphcomp.apply(small, detector, (IMAGES,))
        assert not made.training and made.backbone.branch[0].training  # type: ignore[index,union-attr]
    finally:
        detector.eval()
    made.eval()
    assert type(made) is Detector and made.threshold == detector.threshold
    assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in detector.parameters())
    batch = torch.rand(2, 3, 24, 24)
    for a, b in zip(
        output_tensors(made.head(made.backbone(batch))), output_tensors(small(batch)), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert [x.shape[1] for x in made(IMAGES)] == [4, 4]


def test_the_original_is_left_as_it_is(detector: Detector) -> None:
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    wanted = detector(IMAGES)
    program = traced(detector)
    same = graphcomp.apply(program, detector, (IMAGES,))
    for a, b, c in zip(same(IMAGES), detector(IMAGES), wanted, strict=True):
        torch.testing.assert_close(a, c, rtol=0, atol=0)
        torch.testing.assert_close(b, c, rtol=0, atol=0)
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())
    assert all(a is not b for a, b in zip(same.parameters(), detector.parameters(), strict=True))


def test_padded_channels_take_the_place_of_one_module(detector: Detector) -> None:
    small = graphcomp.compile(
        traced(detector, until="backbone"), "l1{ratio=0.5, join=pad, multiple=1}"
    ).program
    assert any(n.op == "call_function" and n.meta[PASS_KEY] == "l1" for n in small.graph.nodes)
    made = graphcomp.apply(small, detector, (IMAGES,))
    batch = torch.rand(2, 3, 24, 24)
    for a, b in zip(made.backbone(batch), small(batch), strict=True):  # type: ignore[operator]
        torch.testing.assert_close(a, b)
    assert len(made(IMAGES)) == 2


def test_what_is_added_between_layers_is_named(detector: Detector) -> None:
    small = graphcomp.compile(traced(detector), "l1{ratio=0.5, join=pad, multiple=1}").program
    with pytest.raises(SurgeryError, match=r"found .* between layers, .* use join=couple"):
        graphcomp.apply(small, detector, (IMAGES,))


def test_values_that_others_read_end_the_part(detector: Detector) -> None:
    class Reading(Detector):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Conv2d(16, 2, 1)

        def _boxes(self, found: dict[str, list[Tensor]], i: int) -> Tensor:
            return self.more(self.backbone.stem(torch.rand(1, 3, 8, 8))).flatten(2)[0].T

    model = Reading().eval()
    small = graphcomp.compile(traced(model), "l1{ratio=0.5, multiple=1}").program
    with pytest.raises(SurgeryError, match="expected a part whose values are read by nothing else"):
        graphcomp.apply(small, model, (IMAGES,))


class Counting(nn.Module):
    """Counts channels by a number that it holds, or by one in its code."""

    def __init__(self, width: int | None) -> None:
        super().__init__()
        self.a, self.b, self.width = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), width

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        width = 8 if self.width is None else self.width
        if x.shape[1] != width:
            raise ValueError(f"found {x.shape[1]} channels")
        return self.b(x.view(x.shape[0], width, x.shape[2], x.shape[3]))


def test_numbers_that_modules_count_widths_by_follow() -> None:
    model = Counting(8)
    small = graphcomp.compile(
        graphcomp.trace(model, torch.randn(1, 3, 8, 8)), "l1{ratio=0.5, multiple=1}"
    ).program
    made = graphcomp.apply(small, model)
    assert (made.width, model.width) == (4, 8)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(made(x), small(x))


def test_code_that_counts_on_widths_is_refused() -> None:
    model = Counting(None)
    small = graphcomp.compile(
        graphcomp.trace(model, torch.randn(1, 3, 8, 8)), "l1{ratio=0.5, multiple=1}"
    ).program
    with pytest.raises(SurgeryError, match="found view between layers, which passes have added or changed"):
        graphcomp.apply(small, model)


def test_layers_that_are_called_for_nothing_are_named() -> None:
    """They are in no trace, so that nothing says how wide they are to be."""

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.idle = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            self.idle(x)
            return self.b(x)

    model = Idle()
    small = graphcomp.compile(
        graphcomp.trace(model, torch.randn(1, 3, 8, 8)), "l1{ratio=0.5, multiple=1}"
    ).program
    with pytest.raises(SurgeryError, match="expected no calls of layers whose results nothing reads"):
        graphcomp.apply(small, model)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, w, self.bias, self.stride, self.padding)


class Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_a_class_that_does_more_than_its_layer_stays() -> None:
    model = nn.Sequential(Activated(8), nn.Conv2d(8, 8, 3), Activated(8), nn.Conv2d(8, 2, 1)).eval()
    x = torch.randn(2, 8, 10, 10)
    small = graphcomp.compile(graphcomp.trace(model, x[:1]), "l1{ratio=0.5, multiple=1}").program
    made = graphcomp.apply(small, model)
    assert type(made[0]) is Activated  # type: ignore[index]
    torch.testing.assert_close(made(x), small(x))


def test_a_class_that_would_compute_its_weight_again_goes() -> None:
    model = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    x = torch.randn(2, 3, 10, 10)
    with pytest.warns(match="parameters alone"):
        program = graphcomp.trace(model, x[:1])
    small = graphcomp.compile(program, "l1{ratio=0.5, multiple=1}").program
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said when it was traced
        made = graphcomp.apply(small, model)
    torch.testing.assert_close(made(x), small(x))


def test_both_at_once_are_refused() -> None:
    model = nn.Sequential(Standardised(3, 8, 3), Activated(8), nn.Conv2d(8, 2, 1)).eval()
    with pytest.warns(match="parameters alone"):
        program = graphcomp.trace(model, torch.randn(1, 3, 10, 10))
    small = graphcomp.compile(program, "l1{ratio=0.5, multiple=1}").program
    with pytest.raises(SurgeryError):
        graphcomp.apply(small, model)


def test_one_module_under_two_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
            self.same, self.end = self.conv, nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.same(self.conv(self.stem(x)).relu()).relu())

    model, x = Net(), torch.randn(2, 3, 8, 8)
    small = graphcomp.compile(graphcomp.trace(model, x[:1]), "l1{ratio=0.5, multiple=1}").program
    made = graphcomp.apply(small, model)
    torch.testing.assert_close(made(x), small(x))


def test_opened_attention_leaves_nothing_behind() -> None:
    """Its layers are the program's alone: the network keeps torch's module and no other tensors."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.hidden, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head(self.hidden(x).relu())

    model, x = Net().eval(), torch.randn(2, 5, 16)
    program = graphcomp.trace(model, x[:1])
    small = graphcomp.compile(program, "l1{ratio=0.5, multiple=1, exclude='attention*'}").program
    made = graphcomp.apply(small, model)
    torch.testing.assert_close(made(x), small(x))
    assert made.state_dict().keys() == model.state_dict().keys()
    assert made.hidden.out_features == 16  # type: ignore[union-attr]


def test_another_network_is_refused(detector: Detector) -> None:
    with pytest.raises(
        TraceError, match="start: found 'backbone', expected the path of a module of Sequential"
    ):
        graphcomp.apply(traced(detector), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (IMAGES,))


DETECTORS = [
    ("retinanet_resnet50_fpn", "backbone", "head"),
    ("fcos_resnet50_fpn", "backbone", "head"),
    ("ssdlite320_mobilenet_v3_large", "backbone", "head"),
    ("ssd300_vgg16", "backbone", "head"),
    ("fasterrcnn_mobilenet_v3_large_320_fpn", "backbone", "backbone"),
    ("maskrcnn_resnet50_fpn", "backbone", "backbone"),
    ("keypointrcnn_resnet50_fpn", "backbone", "backbone"),
]


def returned(model: nn.Module, until: str, images: list[Tensor]) -> list[Tensor]:
    """What a module returns while the whole network runs."""
    seen: list[Tensor] = []
    hook = model.get_submodule(until).register_forward_hook(lambda m, x, y: seen.extend(output_tensors(y)))
    model(images)
    hook.remove()
    return seen


def zeroed(model: nn.Module, before: Program, masked: Program) -> nn.Module:
    """The network itself, with the zeros of a simulation in its weights."""
    model = copy.deepcopy(model)
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in masked.tensors.items():
            if not torch.equal(tensor, before.tensors[name]):
                own[name].copy_(tensor)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "start", "until"), DETECTORS)
def test_detectors_of_torchvision(name: str, start: str, until: str, tmp_path: Path) -> None:
    """Whole: images in, boxes or losses out, by the detector's own class with the smaller part in it."""
    build = getattr(torchvision.models.detection, name)
    size: dict[str, int] = {} if re.search("ssd|320", name) else {"min_size": 96, "max_size": 128}
    if "rcnn" in name:  # heads of Keypoint R-CNN take 12 GB in float64 for as many boxes as it looks at
        size |= {f"rpn_post_nms_top_n_{mode}": 20 for mode in ("train", "test")}
    model = scramble(build(weights=None, weights_backbone=None, **size), 0).double().eval()
    images = [torch.rand(3, 80, 100).double(), torch.rand(3, 60, 100).double()]
    program = graphcomp.trace(model, (images,), start=start, until=until)
    removal, _ = half(channels := analyse(program)).feasible(random_scores(channels))
    made = graphcomp.apply(removal.apply("test"), model, (images,))
    assert type(made) is type(model)
    assert sum(p.numel() for p in made.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    assert [found.keys() for found in made(images)] == [found.keys() for found in model(images)]
    masked = removal.mask()
    if masked.tensors.keys() == program.tensors.keys():
        wanted = returned(zeroed(model, program, masked), until, images)
    else:  # GroupNorm of channels that are left is no change of weights
        wanted = output_tensors(masked(model.transform(images)[0].tensors))
    for a, b, c in zip(returned(made, until, images), wanted, returned(model, until, images), strict=True):
        assert relative_error(a, b) < 1e-10
        assert relative_error(c, b) > 1e-6
    targets = [
        {
            "boxes": torch.tensor([[10.0, 10, 60, 50]]).double(),
            "labels": torch.ones(1, dtype=torch.int64),
            "masks": torch.ones(1, *x.shape[1:], dtype=torch.uint8),
            "keypoints": torch.full((1, 17, 3), 30.0),  # torchvision takes no other type
        }
        for x in images
    ]
    losses = made.train()(images, targets)
    assert losses.keys() == model.train()(images, targets).keys()
    sum(losses.values()).backward()
    torch.save(made.state_dict(), tmp_path / "made.pt")
    again = graphcomp.apply(removal.apply("test"), model.eval(), (images,))
    again.load_state_dict(torch.load(tmp_path / "made.pt"))
    for a, b in zip(returned(again, until, images), returned(made.eval(), until, images), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.slow
def test_the_page_on_detectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its examples, one after the other."""
    page = Path(__file__).parents[2] / "docs" / "detectors.md"
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    for a, b in zip(
        names["smaller"].eval()(names["images"]), names["again"].eval()(names["images"]), strict=True
    ):
        assert all(torch.equal(a[key], b[key]) for key in a)
    whole, smaller = (sum(p.numel() for p in names[n].parameters()) for n in ("detector", "smaller"))
    assert smaller < whole
    assert type(names["model"].rpn.head.cls_logits) is nn.Conv2d and len(names["model"](names["images"])) == 2


class Opened(nn.Module):
    """torch's attention, its encoder and its recurrent layers around each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.rnn = nn.LSTM(16, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.attention(x, x, x)[0]
        self.rnn.flatten_parameters()
        return self.head(self.rnn(self.encoder(x))[0].mean(1))


@pytest.mark.slow
def test_what_was_opened_is_put_in_narrower() -> None:
    """Modules of ours that are called as torch's were; what no pass has touched stays torch's."""
    model, x = scramble(Opened(), 0).double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    program = graphcomp.trace(model, x)
    result = graphcomp.apply(program, model)
    assert type(result.attention) is nn.MultiheadAttention and type(result.rnn) is nn.LSTM
    small = graphcomp.compile(program, "l1{ratio=0.5, multiple=1}").program
    for result in (graphcomp.apply(small, model), copy.deepcopy(graphcomp.apply(small, model))):
        assert type(result) is Opened and type(result.attention) is not nn.MultiheadAttention
        assert result.rnn.layers[0].hidden_size == 6 and result.attention.in_proj.out_features == 24
        torch.testing.assert_close(result(x), small(x))
        z = result.stem(x)
        y, weights = result.attention(z, z, z, torch.zeros(2, 5, dtype=torch.bool))
        assert y.shape == (2, 5, 8) and weights.shape == (2, 5, 5)
    result(x).sum().backward()
    assert all(p.grad is not None for p in result.parameters())  # no weights of another way of calling it
    assert not result.training and not result.rnn.layers[0].training
