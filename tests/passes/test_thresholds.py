"""First thresholds: what a lost filter costs, the bisection, and what an interruption leaves of it."""

from itertools import pairwise
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphcomp.base.cache import VARIABLE
from graphcomp.channels import Removal, analyse
from graphcomp.data.split import Split
from graphcomp.ir.program import Program
from graphcomp.measure.evaluate import accuracy
from graphcomp.passes.play_and_prune import thresholds
from graphcomp.passes.play_and_prune.filters import find_layers
from graphcomp.passes.play_and_prune.prc import points
from graphcomp.passes.play_and_prune.thresholds import first_threshold, first_thresholds
from graphcomp.train.options import TrainOptions
from graphcomp.train.training import fit
from tests.learnable import make_split, normalised_net
from tests.tiny import traced


@pytest.fixture(scope="module")
def taught() -> Program:
    """A network that knows the four patterns."""
    options = TrainOptions(epochs=6, batch=24, lr=0.1, precision="float32")
    return fit(normalised_net(), make_split(), options).program


def gate(weight: float) -> tuple[Program, Split]:
    """Two classes by the sign of one pixel. Channel 0 carries it; 1 is what class 1 needs, from a filter of
    `weight` and a shift of 5 behind the normalisation; 2 is noise.
    """
    net = nn.Sequential(
        nn.Conv2d(1, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2)
    )
    with torch.no_grad():
        cast(Tensor, net[0].weight).copy_(torch.tensor([1.0, weight, 0.5]).view(3, 1, 1, 1))
        cast(Tensor, net[1].bias).copy_(torch.tensor([0.0, 5.0, -100.0]))
        cast(Tensor, net[4].weight).copy_(torch.tensor([[100.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        cast(Tensor, net[4].bias).zero_()
    x = torch.tensor([1.0, -1.0] * 20).view(-1, 1, 1, 1)
    labels = torch.tensor([0, 1] * 20)
    return traced(net, 1, 1, 1, 1), Split(labels, np.arange(40), lambda i: (x[torch.from_numpy(i)],))


def test_t3_8_the_shift_behind_a_normalisation_is_lost_as_well() -> None:
    """T3.8, T0.5: the small filter is not free; zeros in its weights alone would find it so."""
    program, judges = gate(0.25)
    channels = analyse(program)
    layer = find_layers(channels)["0"]
    assert layer.norms.tolist() == [1.0, 0.25, 0.5]
    assert points(accuracy(program, judges)) == 100.0
    assert first_threshold(channels, layer, judges, 0.1) == 0.0
    program.tensors["4.bias"].data[1] = 5.0  # now nothing depends on the constant
    assert first_threshold(channels, layer, judges, 0.1) == 0.5
    assert first_threshold(channels, layer, judges, 100.0) == 0.5  # one filter stays, whatever may be lost


def test_a_filter_of_zeros_is_free() -> None:
    """Its shift goes into the biases of those who read it, when it is removed and when it is judged."""
    program, judges = gate(0.0)
    channels = analyse(program)
    layer = find_layers(channels)["0"]
    assert first_threshold(channels, layer, judges, 0.0) == 0.5
    drop = Removal.of(channels, layer.channels[layer.norms <= 0.5])
    masked = drop.mask()
    smaller = Removal(analyse(masked), drop.gone).apply("test")
    assert points(accuracy(smaller, judges)) == points(accuracy(program, judges)) == 100.0


def test_thresholds_are_the_largest_that_cost_no_more(taught: Program) -> None:
    """By trying all of them, one after the other."""
    judges, channels = make_split(60, seed=1), analyse(taught)
    whole = points(accuracy(taught, judges))
    for layer in find_layers(channels).values():
        steps, allowed = np.sort(layer.norms)[:-1], 10.0
        costs = []
        for step in steps:
            without = Removal.of(channels, layer.channels[layer.norms <= step]).mask()
            costs.append(whole - points(accuracy(without, judges)))
        found = first_threshold(channels, layer, judges, allowed)
        rising = all(a <= b for a, b in pairwise(costs))
        fits = [s for s, cost in zip(steps, costs, strict=True) if cost <= allowed]
        assert found in (0.0, *steps) and (not rising or found == max(fits, default=0.0))
        if found:
            assert costs[list(steps).index(found)] <= allowed


# ---------------------------------------------------------------------- interruptions


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs whose accuracy is measured."""
    seen: list[Program] = []
    monkeypatch.setattr(thresholds, "accuracy", lambda p, *a, **o: (seen.append(p), accuracy(p, *a, **o))[1])
    return seen


def die(message: str, fraction: float) -> None:
    if message.startswith("threshold 1 of"):
        raise ZeroDivisionError


def test_a_search_goes_on_at_the_layer_where_it_was(
    taught: Program, judged: list[Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if killed after the first of two layers: nothing is measured twice, unless the cache is off."""
    judges, channels = make_split(60, seed=1), analyse(taught)
    layers = find_layers(channels)
    both = {name: first_threshold(channels, layer, judges, 10.0) for name, layer in layers.items()}
    assert list(both) == ["0", "4"] and both["0"] != both["4"]
    whole = len(judged)
    del judged[:]
    with pytest.raises(ZeroDivisionError):
        first_thresholds(channels, layers, judges, 10.0, die)
    before = len(judged)
    del judged[:]
    told: list[str] = []
    assert first_thresholds(channels, layers, judges, 10.0, lambda m, f: told.append(m)) == both
    assert 0 < len(judged) == whole - before
    assert told == ["threshold 1 of 2", "threshold 2 of 2"]
    del judged[:]
    assert first_thresholds(channels, layers, judges, 10.0) == both and not judged
    monkeypatch.setenv(VARIABLE, "")
    assert first_thresholds(channels, layers, judges, 10.0) == both and len(judged) == whole


def test_another_question_is_another_search(taught: Program, judged: list[Program]) -> None:
    judges, channels = make_split(60, seed=1), analyse(taught)
    layers = find_layers(channels)
    for program, some, allowed in (
        (channels, judges, 10.0),
        (channels, judges, 100.0),
        (channels, judges.subset(np.arange(40)), 10.0),
        (analyse(normalised_net()), judges, 10.0),
    ):
        del judged[:]
        first_thresholds(program, layers, some, allowed)
        assert judged
