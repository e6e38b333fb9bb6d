"""Predicted times after factors: from widths alone, what the network that is built would be predicted at."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from graphcomp.budget.calls import calls
from graphcomp.budget.factor_times import FactorCost, LayerClock, factored
from graphcomp.budget.model import LatencyModel
from graphcomp.factors.decompose import Factor, Kind
from graphcomp.factors.surgery import rewrite, simulate
from graphcomp.ir.program import Program
from graphcomp.models import MODELS
from graphcomp.runtime.kernel import Kernel
from graphcomp.runtime.targets import TARGETS
from tests.stopwatch import Machine
from tests.tiny import tiny_program, traced


def model() -> LatencyModel:
    return LatencyModel(TARGETS["cpu-avx2"], timer=Machine())


def of(*factors: Factor) -> dict[str, Factor]:
    return {factor.layer: factor for factor in factors}


def built(program: Program, chosen: Mapping[str, Factor], multiple: int = 1) -> list[tuple[Kernel, int, int]]:
    """The operators of the network that these factors yield, in no order."""
    factors = list(chosen.values())
    result = rewrite(simulate(program, factors), factors, "trial", multiple)
    return sorted((call.operator for call in calls(result)), key=str)


def predicted(
    program: Program, chosen: Mapping[str, Factor], multiple: int = 1
) -> list[tuple[Kernel, int, int]]:
    cost = FactorCost(program, model(), chosen, multiple)
    return sorted((o for call in cost.operators(chosen) for o in call), key=str)


def chain() -> Program:
    """What the last two layers do not read is made by nobody else for them."""
    sizes = ((3, 32, 3), (32, 32, 3), (32, 24, 3), (24, 8, 1))
    layers = [nn.Conv2d(a, b, k, padding=k // 2) for a, b, k in sizes]
    return traced(nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), *layers[2:]), 1, 3, 8, 8)


class Shared(nn.Module):
    """Two layers that pick the same channels of one tensor, a third that picks others, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.a, self.b, self.c = (nn.Conv2d(16, 16, 3) for _ in range(3))
        self.fc = nn.Linear(16 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.fc((self.a(x) + self.b(x) + self.c(x)).flatten(1))  # type: ignore[no-any-return]


some, rest = list(range(0, 32, 3)), list(range(20))

CHOICES = {
    "ranks": (chain, of(Factor(layer="2", rank=8), Factor(layer="4", rank=6, kind="spatial"))),
    "tucker2": (chain, of(Factor(layer="2", rank=8, rank_in=4, kind="tucker2"), Factor(layer="5", rank=3))),
    "unread channels go": (chain, of(Factor(layer="2", keep=rest, rank=8), Factor(layer="4", keep=some))),
    "rows that go make factors dearer": (
        chain,
        of(Factor(layer="2", rank=22), Factor(layer="4", keep=some, rank=4)),
    ),
    "one gather for two": (
        lambda: traced(Shared(), 1, 3, 8, 8),
        of(
            Factor(layer="a", keep=[0, 3, 5, 7], rank=2),
            Factor(layer="b", keep=[0, 3, 5, 7]),
            Factor(layer="c", keep=list(range(12)), rank=8),
            Factor(layer="fc", keep=list(range(64)), rank=2),
        ),
    ),
    "a residual stream": (
        lambda: traced(MODELS["resnet20"].factory(), 1, 3, 16, 16),
        of(
            Factor(layer="layer1.1.conv1", keep=list(range(9)), rank=5),
            Factor(layer="layer1.1.conv2", keep=[1, 2, 3, 9]),
            Factor(layer="layer2.0.conv1", keep=list(range(13))),
            Factor(layer="layer3.2.conv2", keep=list(range(30)), rank=16),
        ),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("multiple", [1, 8])
def test_operators_are_those_of_the_network_that_is_built(name: str, multiple: int) -> None:
    """Without decomposing a weight: the oracle is the rewritten program itself."""
    build, chosen = CHOICES[name]
    program = build()
    assert predicted(program, chosen, multiple) == built(program, chosen, multiple)
    assert predicted(program, {}) == sorted((call.operator for call in calls(program)), key=str)


def test_the_case_of_rows_that_go_is_one() -> None:
    """Rank 22 of 32 x 288 pays while all 32 rows are made; of the 11 that are left it does not."""
    build, chosen = CHOICES["rows that go make factors dearer"]
    cost = FactorCost(build(), model(), chosen)
    alone = cost.operators({"2": chosen["2"]})
    assert [len(alone[i]) for i in range(2)] == [1, 2]
    (only,) = cost.operators(chosen)[1]
    assert only[1:] == (32, 11)


@pytest.mark.slow
def test_parts_are_the_calls_that_can_change() -> None:
    """As many for every choice; their difference is that of the whole networks."""
    build, chosen = CHOICES["a residual stream"]
    program, predict = build(), model()
    cost = FactorCost(program, predict, chosen, 8)
    assert 4 <= len(cost.calls) < len(calls(program))
    fewer = {layer: chosen[layer] for layer in list(chosen)[1:]}

    def whole(factors: Mapping[str, Factor]) -> float:
        return sum(predict.milliseconds(*operator) for operator in built(program, factors, 8))

    for choice in (fewer, {}):
        moved = cost.parts(chosen).sum() - cost.parts(choice).sum()
        assert moved == pytest.approx(whole(chosen) - whole(choice), rel=1e-9)
        assert len(cost.parts(choice)) == len(cost.calls)


@pytest.mark.parametrize("kind", ["svd", "spatial", "tucker2"])
def test_one_layers_operators(kind: Kind) -> None:
    """Ranks are clipped to what is useful, and planes follow stride and padding."""
    program = traced(nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1)), 1, 8, 9, 9)
    (call,) = calls(program)
    chosen = of(Factor(layer="0", rank=3, kind=kind))
    assert sorted(factored(*call.operator, chosen["0"]), key=str) == built(program, chosen)
    clipped = factored(*call.operator, Factor(layer="0", rank=99, kind=kind))
    assert clipped[0][2] in (8, 12, 24)


def test_a_clock_of_single_layers() -> None:
    """Each alone, all else as it is; a layer that is called twice counts twice."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(self.stem(x)))  # type: ignore[no-any-return]

    for program, layer, times in ((tiny_program(), "inner", 1), (traced(Twice(), 1, 3, 8, 8), "conv", 2)):
        factor = Factor(layer=layer, rank=4)
        clock = LayerClock(program, model(), [factor])
        kernel, into, out = next(c.operator for c in calls(program) if c.node.target == layer)
        thin = sum(clock.model.milliseconds(*o) for o in factored(kernel, into, out, factor))
        assert clock.milliseconds(factor) == pytest.approx(times * thin)
        dense = times * clock.model.milliseconds(kernel, into, out)
        assert clock.saving(factor) == pytest.approx(dense - times * thin)
        assert clock.whole == pytest.approx(clock.model.predict(program))


def test_no_weight_is_looked_at() -> None:
    """A network without numbers is enough."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3))
    program = traced(net, 1, 3, 8, 8)
    chosen = of(Factor(layer="1", keep=[0, 1, 2, 3, 4, 5, 6, 7], rank=4))
    assert [o[1:] for o in FactorCost(program, model(), chosen).operators(chosen)[1]] == [(8, 4), (4, 16)]
