"""student: the counts of the papers, equal widths in a stage, and the weights that it begins with."""

from typing import Any

import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import nn

from graphcomp.compiler.recipe import parse_passes
from graphcomp.errors import PassError
from graphcomp.ir.program import Program
from graphcomp.measure.cost import params_trainable
from graphcomp.models import MODELS
from graphcomp.models.preact_resnet import PreActResNet
from graphcomp.models.resnet_cifar import ResNet
from graphcomp.passes import PASSES, Student
from graphcomp.pipeline import Pass
from graphcomp.pipeline.verify import TOLERANCE
from tests.running import run_pass
from tests.tiny import context, tiny_program, traced


def count(module: nn.Module, side: int, **options: Any) -> int:
    """Trainable parameters of the student."""
    program, pass_ = traced(module, 1, 3, side, side), Student(init="slice", **options)
    return params_trainable(pass_.rewrite(program, pass_.plan(program, context())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("outputs", "also", "expected"),
    [
        (1000, (), 11_707_720),
        (3, (), 11_642_915),
        (1000, ("conv1",), 11_694_018),
        (3, ("conv1",), 11_629_213),
    ],
)
def test_g2_3_resnet50(outputs: int, also: tuple[str, ...], expected: int) -> None:
    module = torchvision.models.resnet50(num_classes=outputs)
    assert count(module, 32, fraction="1/32", also=also) == expected


@pytest.mark.slow
def test_g2_3_resnet110() -> None:
    assert count(MODELS["resnet110"].factory(), 32, fraction="1/2") == 866_002


@pytest.mark.slow
def test_g2_3_preact_resnet164() -> None:
    """The golden count has the stem halved; no addition reads the stem, so it has to be asked for."""
    assert count(MODELS["preact-resnet164"].factory(), 32, fraction=0.5, also="conv1") == 1_280_626
    assert count(PreActResNet(11), 16, also="conv1") < count(PreActResNet(11), 16)


def stage_widths(program: Program) -> list[int]:
    return [program.layer(f"layer{s}.0.conv2", nn.Conv2d).out_channels for s in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fraction", "widths"),
    [("1/2", [8, 16, 32]), ("1/4", [4, 8, 16]), ("1/32", [1, 1, 2]), (0.3, [5, 10, 19])],
)
@pytest.mark.parametrize("option", ["A", "B"])
def test_every_stage_at_the_fraction(option: str, fraction: Any, widths: list[int]) -> None:
    """Also where a shortcut pads with zeros, and the stages share channels."""
    program = traced(ResNet(14, option), 1, 3, 16, 16)
    step, plan, result = run_pass(Student(fraction=fraction), program, context())
    assert step.verify_error <= TOLERANCE
    assert stage_widths(result) == widths
    assert result.layer("conv1", nn.Conv2d).out_channels == widths[0]
    for stage, width in enumerate(widths, 1):
        for block in (0, 1):
            assert result.layer(f"layer{stage}.{block}.conv2", nn.Conv2d).out_channels == width
            inner = result.layer(f"layer{stage}.{block}.conv1", nn.Conv2d)
            assert inner.out_channels == 8 * 2**stage  # prunable layers stay whole
    assert plan.evidence["layers"]["layer3.1.conv2"] == [64, widths[2]]
    whole = {f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in (0, 1)}
    assert {k.where for k in plan.kept} == {*whole, "linear"}


def test_slice_keeps_the_largest_filters() -> None:
    program = tiny_program()
    step, plan, result = run_pass(Student(fraction=0.5, init="slice"), program, context())
    norms = sum(program.tensors[f"{n}.weight"].abs().sum((1, 2, 3)) for n in ("stem", "outer"))
    assert isinstance(norms, torch.Tensor)
    kept = norms.argsort(descending=True)[:8].sort().values
    assert torch.equal(result.tensors["stem.weight"], program.tensors["stem.weight"][kept])
    assert torch.equal(result.tensors["outer.weight"], program.tensors["outer.weight"][kept])
    assert torch.equal(result.tensors["bn0.running_mean"], program.tensors["bn0.running_mean"][kept])
    assert plan.decisions["rows"].keys() == {"stem.weight", "outer.weight"}
    assert step.verify_error <= TOLERANCE


def test_random_weights_have_the_narrow_layers_scale() -> None:
    """Kaiming's deviation for the fan-in that is left, not for the one that was."""
    program = traced(ResNet(14), 1, 3, 16, 16)
    _, _, result = run_pass(Student(fraction="1/4"), program, context())
    layer = result.layer("layer3.1.conv1", nn.Conv2d)
    assert tuple(layer.weight.shape) == (64, 16, 3, 3)
    expected = (2 / (16 * 9)) ** 0.5
    assert abs(float(layer.weight.detach().std()) / expected - 1) < 0.03
    norm = result.layer("layer3.1.bn1", nn.BatchNorm2d)
    assert norm.running_mean is not None and not norm.running_mean.any()
    assert bool((norm.weight == 1).all()) and not result.tensors["linear.bias"].any()


@pytest.mark.slow
def test_seeds() -> None:
    """The run's, or its own; the program itself does not matter to what is drawn."""
    program = tiny_program()
    results = [
        run_pass(Student(seed=own), program, context(seed=run))[2].fingerprint()
        for own, run in ((None, 0), (None, 0), (None, 1), (1, 0))
    ]
    assert results[0] == results[1] != results[2] == results[3]


def test_what_cannot_be_drawn_is_said() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Conv2d(4, 2, 1))
    plan = Student(also="0").plan(traced(net, 1, 3, 4, 4), context())
    assert ("1", "its weights stay: no rule to draw them by") in {(k.where, k.reason) for k in plan.kept}


def test_refusals() -> None:
    plain = traced(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), 1, 3, 4, 4)
    with pytest.raises(PassError, match="found no layers that meet at an addition"):
        Student().plan(plain, context())
    with pytest.raises(PassError, match=r"also: found no layer that 'conv\*' matches, expected one of 0, …"):
        Student(also="conv*").plan(plain, context())
    for wrong in ("1/0", "many", "3/2", 0):
        with pytest.raises(ValidationError):
            Student(fraction=wrong)  # type: ignore[arg-type]


def test_in_a_recipe() -> None:
    made: list[Pass] = parse_passes('student{fraction=1/32, also=["conv1"], init=slice}', PASSES)
    assert made == [Student(fraction=1 / 32, also=("conv1",), init="slice")]
