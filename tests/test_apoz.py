"""apoz: the rule by hand, what is counted, and which layers are judged."""

from typing import cast

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

import graphcomp
from graphcomp.channels import analyse
from graphcomp.data import Data, Split
from graphcomp.errors import DataError, PassError
from graphcomp.models import MODELS
from graphcomp.passes import APoZ
from graphcomp.passes.apoz import beyond_sigma
from graphcomp.pipeline import Context, run_pass
from graphcomp.program import Program
from graphcomp.verify import TOLERANCE
from tests.nets import Net, scramble
from tests.tiny import context, random_data, seeded, tiny_program, traced

__all__ = ["seeded"]


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
def test_rule(apoz: list[float], gone: list[int]) -> None:
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
    axis = next(a for a in channels.axes if a.role == "out" and a.tensors[0][0] == f"{layer}.weight")
    return (1 - found[axis.channels]).tolist()


def conv_net(act: nn.Module | None = None) -> Program:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), act or nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    return traced(scramble(net, 1), 1, 3, 8, 8)


def test_counts_after_normalisation_and_relu() -> None:
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
    split = Split(torch.zeros(2, dtype=torch.int64), np.arange(2), lambda i: x[torch.from_numpy(i)], False)
    data = Data(split, split, None, "by hand", "two samples")
    assert scores(traced(net, 1, 2, 2, 2), data, "0") == [3 / 8, 4 / 8]


def test_batch_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """T2.2."""
    monkeypatch.setenv("GRAPHCOMP_CACHE", "")
    program, data = conv_net(), random_data(3, 8, 8, samples=150)
    found = []
    for size in (7, 64, 150):
        monkeypatch.setattr("graphcomp.calibrate.BATCHES", (size, size))
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
    with pytest.raises(PassError, match="no channel to remove"):
        APoZ(multiple=1, max_fraction=0.1).plan(program, context(data))


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
    plan = APoZ(ratio=0.5, allow_nothing=True).plan(program, context(data))
    assert ("0", "no ReLU behind it, so zeros say nothing") in {(k.where, k.reason) for k in plan.kept}
    assert plan.decisions["rows"] == {}
    with pytest.raises(PassError, match="0: no ReLU behind it"):
        APoZ(ratio=0.5).plan(program, context(data))


def test_a_layer_that_feeds_more_than_the_relu_is_kept() -> None:
    net = Net(lambda m, x: m.b((y := m.a(x)).relu() + y), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1))
    plan = APoZ(ratio=0.5, allow_nothing=True).plan(traced(net, 1, 3, 8, 8), context(random_data(3, 8, 8)))
    assert ("a", "no ReLU behind it, so zeros say nothing") in {(k.where, k.reason) for k in plan.kept}


def judged(module: nn.Module, *shape: int) -> set[str]:
    channels = analyse(traced(module, *shape))
    _, unjudged = APoZ().score(channels, context(random_data(*shape[1:], samples=1)))
    assert all("shared with" in reason for reason in unjudged.values())
    return {g.name for g in channels.removable if g.name not in unjudged}


def test_judged_layers_of_resnet50() -> None:
    """Every block's first two convolutions, and the stem, which no addition reads."""
    names = {
        f"layer{s + 1}.{b}.conv{c}" for s, n in enumerate((3, 4, 6, 3)) for b in range(n) for c in (1, 2)
    }
    assert len(names) == 32
    assert judged(torchvision.models.resnet50(), 1, 3, 32, 32) == {"conv1"} | names


def test_judged_layers_of_resnet56() -> None:
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
    with pytest.raises(PassError, match="pass 'apoz' failed after trace: calibration: found") as caught:
        graphcomp.compile(tiny_program(), "apoz")
    assert isinstance(caught.value.__cause__, DataError)


def test_context_is_only_looked_at() -> None:
    data = random_data(3, 8, 8)
    program = tiny_program()
    before = {k: t.clone() for k, t in program.tensors.items()}
    first = APoZ(ratio=0.5).plan(program, Context(context().target, data, 0))
    assert APoZ(ratio=0.5).plan(program, Context(context().target, data, 9)) == first
    assert all(torch.equal(t, before[k]) for k, t in program.tensors.items())
