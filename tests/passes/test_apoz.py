"""apoz: the rule by hand, what is counted, and which layers are judged."""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import Tensor, nn

import graphcomp
from graphcomp.channels import analyse
from graphcomp.compiler.recipe import parse_passes
from graphcomp.data.split import Data, Split
from graphcomp.errors import DataError, PassError
from graphcomp.ir.program import Program
from graphcomp.models import MODELS
from graphcomp.passes import PASSES, APoZ, Finetune
from graphcomp.passes.apoz.apoz import beyond_sigma
from graphcomp.pipeline import Context, Course, Pipeline
from graphcomp.pipeline.verify import TOLERANCE
from graphcomp.train.options import TrainOptions
from graphcomp.train.training import fit
from tests.learnable import make_data, make_split, same
from tests.nets import Net, scramble
from tests.running import run_pass
from tests.tiny import context, random_data, tiny_program, traced


@pytest.mark.parametrize(
    ("apoz", "gone"),
    [
        ([0.2, 0.3, 0.25, 0.9], [3]),
        ([0.5, 0.5, 0.5, 0.5], []),
        ([0.1, 0.2, 0.9, 0.95], [3]),  # population deviation; the sample's would remove nothing
        ([0.0, 0.0, 0.0, 1.0], [3]),
        ([1.0, 0.0, 1.0, 0.0], []),  # mean + deviation is 1: strictly more is asked for
        ([0.7], []),
        ([0.3, 0.3 + 1e-13], []),  # rounding, not a difference
    ],
)
def test_g2_1_rule(apoz: list[float], gone: list[int]) -> None:
    assert beyond_sigma(np.array(apoz)) == gone


def test_rule_never_takes_half_of_a_layer() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        apoz = rng.random(int(rng.integers(2, 20))) ** rng.integers(1, 6)
        assert len(beyond_sigma(apoz)) < len(apoz) / 2


def scores(program: Program, data: Data, layer: str, **options: int) -> list[float]:
    """APoZ of a layer's channels."""
    channels = analyse(program)
    found, _ = APoZ(**options).score(channels, context(data))
    axis = next(a for a in channels.axes if a.role == "out" and a.layer == layer)
    return (1 - found[axis.channels]).tolist()


def conv_net(act: nn.Module | None = None) -> Program:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), act or nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    return traced(scramble(net, 1), 1, 3, 8, 8)


def test_t2_1_counts_after_normalisation_and_relu() -> None:
    """T2.1: a large negative shift in one channel of the normalisation makes it zero everywhere."""
    program = conv_net()
    bias = cast(Tensor, program.layer("1").bias).data
    bias[:] = 0.1
    bias[2], bias[5] = -1e3, 1e3
    apoz = scores(program, random_data(3, 8, 8), "0")
    assert apoz[2] == 1.0 and apoz[5] == 0.0
    others = [a for i, a in enumerate(apoz) if i not in (2, 5)]
    assert all(0 < a < 1 for a in others)


def test_value_by_hand() -> None:
    """Identity 1x1 convolution: the share of entries that are not positive."""
    net = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 1, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2).view(2, 2, 1, 1))  # type: ignore[operator]
    x = torch.tensor(
        [[[[1.0, -1.0], [0.0, 2.0]], [[-1.0, -1.0], [-3.0, 2.0]]], [[[1.0, 1.0], [1.0, -2.0]]] * 2]
    )
    split = Split(torch.zeros(2, dtype=torch.int64), np.arange(2), lambda i: (x[torch.from_numpy(i)],), False)
    data = Data(split, split, None, "by hand", "two samples")
    assert scores(traced(net, 1, 2, 2, 2), data, "0") == [3 / 8, 4 / 8]


def test_t2_2_batch_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """T2.2."""
    monkeypatch.setenv("GRAPHCOMP_CACHE", "")
    program, data = conv_net(), random_data(3, 8, 8, samples=150)
    found = []
    for size in (7, 64, 150):
        monkeypatch.setattr("graphcomp.measure.calibrate.BATCHES", (size, size))
        found.append(scores(program, data, "0"))
    assert found[0] == found[1] == found[2]


def test_as_many_samples_as_asked_for() -> None:
    program, data = conv_net(), random_data(3, 8, 8, samples=100)
    few, some = scores(program, data, "0", samples=20), scores(program, data, "0", samples=100)
    assert few != some
    whole = 20 * 6 * 6
    assert all(abs(a * whole - round(a * whole)) < 1e-6 for a in few)


def test_removes_the_dead_channels() -> None:
    program = conv_net()
    bias = cast(Tensor, program.layer("1").bias).data
    bias[:] = 1.0
    bias[[1, 6]] = -1e3
    step, plan, result = run_pass(APoZ(multiple=1), program, context(random_data(3, 8, 8)))
    assert plan.decisions["rows"] == {"0.weight": [1, 6]}
    assert step.verify_error <= TOLERANCE
    assert step.drift is not None and step.drift.relative_l2 == 0  # they were zero anyway
    assert result.layer("0", nn.Conv2d).out_channels == 6


def test_at_most_a_fraction() -> None:
    program = conv_net()
    bias = cast(Tensor, program.layer("1").bias).data
    bias[:] = 1.0
    bias[[1, 3, 6]] = -1e3
    data = random_data(3, 8, 8)
    for fraction, count in ((0.5, 3), (0.3, 2), (0.125, 1)):
        plan = APoZ(multiple=1, max_fraction=fraction).plan(program, context(data))
        assert len(plan.decisions["rows"]["0.weight"]) == count
    assert not APoZ(multiple=1, max_fraction=0.1).plan(program, context(data)).decisions["rows"]


def test_ratio_overrides_the_rule() -> None:
    program, data = conv_net(), random_data(3, 8, 8)
    apoz = scores(program, data, "0")
    plan = APoZ(multiple=1, ratio=0.5).plan(program, context(data))
    assert plan.decisions["rows"] == {"0.weight": sorted(np.argsort(apoz)[-4:].tolist())}


def test_linear_layers_on_tokens() -> None:
    """Channels are the last dimension there, not the second."""
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    with torch.no_grad():
        net[0].bias.copy_(torch.zeros(12))  # type: ignore[operator]
        net[0].bias[7] = -1e3  # type: ignore[index]
    program, data = traced(net, 1, 10, 6), random_data(10, 6)
    apoz = scores(program, data, "0")
    assert [a == 1 for a in apoz] == [i == 7 for i in range(12)]
    step, plan, _ = run_pass(APoZ(multiple=1), program, context(data))
    assert 7 in plan.decisions["rows"]["0.weight"]
    assert step.verify_error <= TOLERANCE


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.ReLU6()])
def test_other_relus(act: nn.Module) -> None:
    """ReLU6 counts its lower side only."""
    plain = scores(conv_net(), random_data(3, 8, 8), "0")
    assert scores(conv_net(act), random_data(3, 8, 8), "0") == plain


def test_without_relu_is_kept_with_the_reason() -> None:
    program, data = conv_net(nn.GELU()), random_data(3, 8, 8)
    plan = APoZ(ratio=0.5).plan(program, context(data))
    assert ("0", "no ReLU behind it, so zeros say nothing") in {(k.where, k.reason) for k in plan.kept}
    assert plan.decisions["rows"] == {}
    with pytest.raises(PassError, match="0: no ReLU behind it"):
        Pipeline([APoZ(ratio=0.5)]).run(program, context(data))


def test_a_layer_that_feeds_more_than_the_relu_is_kept() -> None:
    net = Net(lambda m, x: m.b((y := m.a(x)).relu() + y), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1))
    plan = APoZ(ratio=0.5).plan(traced(net, 1, 3, 8, 8), context(random_data(3, 8, 8)))
    assert ("a", "no ReLU behind it, so zeros say nothing") in {(k.where, k.reason) for k in plan.kept}


def judged(module: nn.Module, *shape: int) -> set[str]:
    channels = analyse(traced(module, *shape))
    _, unjudged = APoZ().score(channels, context(random_data(*shape[1:], samples=1)))
    assert all("shared with" in reason for reason in unjudged.values())
    return {g.name for g in channels.removable if g.name not in unjudged}


@pytest.mark.slow
def test_t2_4_judged_layers_of_resnet50() -> None:
    """T2.4: every block's first two convolutions, and the stem, which no addition reads."""
    names = {
        f"layer{s + 1}.{b}.conv{c}" for s, n in enumerate((3, 4, 6, 3)) for b in range(n) for c in (1, 2)
    }
    assert len(names) == 32
    assert judged(torchvision.models.resnet50(), 1, 3, 32, 32) == {"conv1"} | names


def test_t2_4_judged_layers_of_resnet56() -> None:
    """T2.4."""
    expected = {f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(9)}
    assert len(expected) == 27
    assert judged(MODELS["resnet56"].factory(), 1, 3, 32, 32) == expected


def test_shared_channels_are_kept_with_the_reason() -> None:
    plan = APoZ(ratio=0.5).plan(tiny_program(), context(random_data(3, 8, 8)))
    assert ("stem", "its channels are shared with 1 other layer(s)") in {
        (k.where, k.reason) for k in plan.kept
    }
    assert list(plan.decisions["rows"]) == ["inner.weight"]


def test_without_data() -> None:
    with pytest.raises(DataError, match="calibration: found no data, expected samples; give --data"):
        APoZ().plan(tiny_program(), context())
    with pytest.raises(PassError, match="pass 'apoz' cannot work after trace: calibration: found") as caught:
        graphcomp.compile(tiny_program(), "apoz")
    assert isinstance(caught.value.__cause__, DataError)


def test_context_is_only_looked_at() -> None:
    data = random_data(3, 8, 8)
    program = tiny_program()
    before = {k: t.clone() for k, t in program.tensors.items()}
    first = APoZ(ratio=0.5).plan(program, Context(context().target, data, 0))
    assert APoZ(ratio=0.5).plan(program, Context(context().target, data, 9)) == first
    assert all(torch.equal(t, before[k]) for k, t in program.tensors.items())


def test_t2_4_the_stem_by_flag() -> None:
    """T2.4: `exclude` keeps the one layer of ResNet-50 whose status the paper leaves open."""
    program, data = conv_net(), random_data(3, 8, 8)
    plan = APoZ(multiple=1, ratio=0.5, exclude=("0",)).plan(program, context(data))
    assert ("0", "excluded") in {(k.where, k.reason) for k in plan.kept} and plan.decisions["rows"] == {}


def test_t2_3_high_values_go_by_each_layers_own_statistics() -> None:
    """T2.3: a layer that is zero more often than the other loses its own outlier, and not all of itself."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )  # fmt: skip
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([9.0] * 7 + [-9.0]))  # type: ignore[operator]
        net[2].weight.mul_(0.1)  # type: ignore[operator]
        net[2].bias.copy_(torch.tensor([-9.0] * 7 + [9.0]))  # type: ignore[operator]
    program, data = traced(net, 1, 3, 8, 8), random_data(3, 8, 8)
    assert min(scores(program, data, "2")[:7]) > max(scores(program, data, "0")[:7])
    plan = APoZ(multiple=1).plan(program, context(data))
    assert plan.decisions["rows"] == {"0.weight": [7]}


# ---------------------------------------------------------------------- over several steps


def stepwise(**options: Any) -> APoZ:
    training = Finetune(**{"epochs": 1, "batch": 24, "lr": 0.02, "precision": "float32", "held_out": 0.25})
    return APoZ(**{"steps": 3, "tolerance": 50.0, "finetune": training, **options})


@pytest.fixture(scope="module")
def taught() -> Program:
    """A network that knows the four patterns, wide enough to lose some of it."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 24, 3, stride=2, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(),
        nn.Linear(216, 4),
    )  # fmt: skip
    options = TrainOptions(epochs=4, batch=24, lr=0.05, precision="float32")
    return fit(traced(net, 1, 3, 8, 8), make_split(), options).program


@pytest.mark.slow
def test_steps_are_the_single_step_and_a_training_in_turn(taught: Program) -> None:
    """METHODS 2.4, every step on what the last one left: rounds equal the passes one by one."""
    step, plan, result = run_pass(stepwise(steps=2), taught, context(make_data()))
    by_hand, training = taught, stepwise().finetune
    assert training is not None
    for number, pass_ in enumerate((APoZ(multiple=1), training) * 2, 1):
        by_hand = run_pass(pass_, by_hand, context(make_data(), seed=number))[2]
    assert same(result, by_hand)
    assert [row.name for row in step.rounds] == ["apoz", "finetune", "apoz", "finetune"]
    assert all(row.removed.keys() <= {"0", "3"} for row in step.rounds)
    assert sum(step.rounds[0].removed.values()) > 0 and sum(step.rounds[2].removed.values()) > 0
    assert step.summary.endswith("; all 2 steps done")
    assert plan.options["steps"] == 2 and step.verify_error <= TOLERANCE
    for row in step.rounds[::2]:  # the rule's own bound, in every layer of every step
        widths = {g["group"]: g["channels"] for g in row.plan.evidence["groups"]}
        assert all(lost < widths[layer] / 2 for layer, lost in row.removed.items())


@pytest.mark.slow
@pytest.mark.parametrize(("bad_after", "kept"), [(1, 0), (2, 2), (3, 4)])
def test_a_drop_beyond_the_tolerance_restores_the_last_good_step(
    taught: Program, monkeypatch: pytest.MonkeyPatch, bad_after: int, kept: int
) -> None:
    """An oracle says that the training of some step did not bring the accuracy back."""
    real = Course.snapshots.fget  # type: ignore[attr-defined]

    def measured(course: Course) -> Any:
        def told(number: int, top1: float) -> float:
            if number % 2:  # after a removal, before the training: not what is judged
                return 0.0
            return top1 - 0.011 if number >= 2 * bad_after else top1 - 0.01

        found = real(course)
        top1 = found[0].score.value
        scores = [found[0].score.model_copy(update={"value": told(i, top1)}) for i in range(len(found))]
        rest = zip(found[1:], scores[1:], strict=True)
        return [found[0], *(s.model_copy(update={"score": a}) for s, a in rest)]

    monkeypatch.setattr(Course, "snapshots", property(measured))
    step, _, result = run_pass(stepwise(tolerance=1.0), taught, context(make_data()))
    assert len(step.rounds) == 2 * bad_after
    assert step.kept_rounds == kept
    assert len(result.history) == kept
    assert step.summary.endswith(f"; step {bad_after} lost 1.10 points of accuracy, more than 1")


def test_the_end_of_what_the_rule_finds(taught: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that removes nothing is not trained, nor part of the result."""
    calls: list[int] = []

    def once(apoz: Any) -> list[int]:
        calls.append(1)
        return beyond_sigma(apoz) if len(calls) <= 2 else []

    monkeypatch.setattr("graphcomp.passes.apoz.apoz.beyond_sigma", once)
    step, _, result = run_pass(stepwise(), taught, context(make_data()))
    assert [row.name for row in step.rounds] == ["apoz", "finetune", "apoz"]
    assert step.kept_rounds == 2
    assert len(result.history) == 2 and step.summary.endswith("; step 2 found nothing beyond the rule")


def test_nothing_beyond_the_rule_at_all(taught: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphcomp.passes.apoz.apoz.beyond_sigma", lambda apoz: [])
    with pytest.raises(PassError, match="apoz: found nothing to change"):
        Pipeline([stepwise()]).run(taught, context(make_data()))
    step, _, result = run_pass(stepwise(), taught, context(make_data()))
    assert same(result, taught) and step.summary.startswith("kept 0 of 1 rounds") and not step.changed


def test_counts_are_rounded_only_if_asked_for(taught: Program) -> None:
    """A step takes few channels: rounded up to what the kernels compute, none would ever go."""
    where = context(make_data())
    assert where.target.multiple > 1
    step, _, _ = run_pass(stepwise(steps=2), taught, where)
    assert step.rounds[0].plan.evidence["multiple"] == 1
    assert not run_pass(stepwise(steps=2, multiple=24), taught, where)[0].changed


def test_problems_are_found_before_the_first_removal(taught: Program) -> None:
    with pytest.raises(DataError, match="apoz: found data without labels"):
        run_pass(stepwise(), taught, context(random_data(3, 8, 8)))
    shifted = make_data()
    shifted = replace(shifted, train=replace(shifted.train, labels=shifted.train.labels + 1))
    with pytest.raises(DataError, match="found class 4, expected classes below 4"):
        run_pass(stepwise(), taught, context(shifted))
    with pytest.raises(PassError, match=r"apoz: found no \(batch, classes\) output"):
        run_pass(stepwise(), conv_net(), context(make_data()))


def test_steps_in_a_recipe() -> None:
    (made,) = parse_passes("apoz{steps=6, tolerance=0.5, finetune={epochs=2, lr=0.02}}", PASSES)
    assert isinstance(made, APoZ) and made.finetune is not None and made.iteration is not None
    assert (made.steps, made.tolerance, made.finetune.epochs, made.finetune.lr) == (6, 0.5, 2, 0.02)
    assert made.iteration.most_rounds == 12
    assert APoZ().iteration is None and APoZ(steps=2).iteration == APoZ(steps=2).iteration


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tolerance": 1.0}, "found tolerance with one step, expected more, e.g. steps=6"),
        ({"finetune": {}}, "found finetune with one step"),
        ({"steps": 2, "ratio": 0.5}, "found ratio with steps, expected one of them"),
        ({"steps": 2, "target": "macs:0.5"}, "found target with steps"),
        ({"steps": 2, "finetune": {"held_out": 0}}, "found finetune.held_out=0, expected held-out samples"),
        ({"steps": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        APoZ(**options)
