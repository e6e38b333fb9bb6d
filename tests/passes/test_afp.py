"""The pruner: norms of filters, candidates, the term on them and on nothing else, and the cut."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from graphcomp.channels import analyse
from graphcomp.ir.program import Program
from graphcomp.models import MODELS
from graphcomp.passes.play_and_prune.afp import Cut, Epoch, EpochOptions
from graphcomp.passes.play_and_prune.filters import candidates, emptied, find_layers, penalised
from graphcomp.pipeline.verify import TOLERANCE
from graphcomp.records import Plan
from graphcomp.train.options import Seen, cross_entropy
from tests.learnable import SHAPE, make_data, normalised_net
from tests.running import run_pass
from tests.tiny import context, tiny_program, traced

QUICK: dict[str, Any] = {"batch": 24, "lr": 0.05, "precision": "float32"}


def ones(program: Program) -> Seen:
    """What a loss sees of a network that says nothing."""
    x = torch.zeros(2, *SHAPE)
    return Seen(x, torch.tensor([0, 1]), torch.zeros(2, 4), {}, tensors=program.tensors)


# ---------------------------------------------------------------------- filters


def test_t3_7_norms_of_a_known_tensor() -> None:
    """T3.7: over input channels and kernel, a number a filter; without bias and without normalisation."""
    net = nn.Sequential(nn.Conv2d(2, 3, (1, 2)), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(12.0).reshape(3, 2, 1, 2) - 5)  # type: ignore[operator]
        for tensor in (net[0].bias, net[1].weight, net[1].bias):
            tensor.fill_(1e3)  # type: ignore[union-attr, operator]
    layer = find_layers(analyse(traced(net, 1, 2, 4, 4)))["0"]
    assert layer.norms.shape == (3,)
    assert layer.norms.tolist() == [5 + 4 + 3 + 2, 1 + 0 + 1 + 2, 3 + 4 + 5 + 6]
    assert layer.rows.tolist() == [0, 1, 2]


def test_filters_of_a_linear_layer_and_of_convolution_groups() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 6, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), nn.Linear(5, 2)
    )
    program = traced(net, 1, 4, 2, 2)
    layers = find_layers(analyse(program))
    assert sorted(layers) == ["0", "3"]  # the last one is the output
    for name, layer in layers.items():
        weight = program.tensors[f"{name}.weight"].detach().double()
        assert layer.norms == pytest.approx(weight.flatten(1).abs().sum(1).numpy())


def test_t2_4_the_same_split_as_apoz() -> None:
    """T2.4: only the first convolutions of the blocks: 27 of ResNet-56."""
    channels = analyse(traced(MODELS["resnet56"].factory(), 1, 3, 32, 32))
    assert list(find_layers(channels)) == [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(9)]
    some = find_layers(channels, ("layer1.*", "layer3.*"), ("*.0.conv1",))
    assert list(some) == [f"layer{s}.{b}.conv1" for s in (1, 3) for b in range(1, 9)]
    assert list(find_layers(analyse(tiny_program()))) == ["inner"]


@pytest.mark.parametrize(
    ("alpha", "count", "chosen"),
    [(0.25, 8, 2), (0.25, 7, 1), (0.1, 9, 0), (0.1, 10, 1), (0.29, 100, 29), (0.1, 30, 3), (0.99, 2, 1),
     (0.99, 1, 0)],
)  # fmt: skip
def test_candidates_are_the_floor_of_alpha_n_smallest(alpha: float, count: int, chosen: int) -> None:
    """And never all of them; 0.29 * 100 is a little less than 29 in floating point."""
    norms = np.random.default_rng(0).permutation(count).astype(float)
    found = candidates(norms, alpha)
    assert sorted(norms[found]) == list(range(chosen))


def test_only_candidates_go_and_only_up_to_the_threshold() -> None:
    norms = np.array([3.0, 0.1, 0.2, 0.1, 5.0])
    assert emptied(norms, np.array([1, 3]), 10.0).tolist() == [1, 3]
    assert emptied(norms, np.array([1, 3]), 0.1).tolist() == [1, 3]
    assert emptied(norms, np.array([0, 1]), 1.0).tolist() == [1]
    assert emptied(norms, np.array([1, 3]), 0.0).tolist() == []


# ---------------------------------------------------------------------- an epoch


def test_t3_3_the_term_pulls_at_candidates_and_at_nothing_else() -> None:
    """T3.3: its gradient is the weight times the sign in U, and 0 elsewhere."""
    program = normalised_net().clone()
    layers = find_layers(analyse(program))
    chosen = {"0": (layers["0"].axis, [1, 4]), "4": (layers["4"].axis, [0])}
    seen = ones(program)
    plain = cross_entropy()(seen)
    found = penalised(cross_entropy(), 0.5, chosen)(seen)
    sums = sum(float(layers[n].norms[rows].sum()) for n, (_, rows) in chosen.items())
    assert float((found - plain).detach()) == pytest.approx(0.5 * sums, rel=1e-5)
    found.backward()  # type: ignore[no-untyped-call]
    for name, tensor in program.tensors.items():
        layer = name.removesuffix(".weight")
        if layer not in chosen:
            assert tensor.grad is None
            continue
        expected = torch.zeros_like(tensor)
        rows = chosen[layer][1]
        expected[rows] = 0.5 * tensor.detach()[rows].sign()
        assert torch.equal(tensor.grad, expected)  # type: ignore[arg-type]


def test_without_weight_it_is_the_plain_loss() -> None:
    program = normalised_net()
    pass_ = Epoch(**QUICK)
    plan = pass_.plan(program, context(make_data()))
    assert plan.decisions["candidates"] == {}
    seen = ones(program)
    assert torch.equal(pass_.lesson(program, plan, context()).loss(seen), cross_entropy()(seen))


def test_the_plan_says_which_filters_are_pressed() -> None:
    """Candidates are chosen once: the loss goes by those of the plan, whatever the norms are."""
    program, pass_ = normalised_net(), Epoch(**QUICK, weight=0.05, alpha=0.4)
    plan = pass_.plan(program, context(make_data()))
    decisions = {**plan.decisions, "candidates": {"0": [5]}}
    loss = pass_.lesson(program, plan.model_copy(update={"decisions": decisions}), context()).loss
    seen = ones(program)
    expected = 0.05 * program.tensors["0.weight"][5].abs().sum()
    assert torch.allclose(loss(seen) - cross_entropy()(seen), expected, atol=1e-6)


def test_an_epoch_shrinks_its_candidates() -> None:
    """The rows that the plan names lose norm against an epoch without the term; the others hardly differ."""
    program, where = normalised_net(), context(make_data())
    step, plan, pulled = run_pass(Epoch(**QUICK, weight=0.05, alpha=0.4, pressure=0.5), program, where)
    _, _, free = run_pass(Epoch(**QUICK), program, where)
    assert plan.decisions["candidates"].keys() == {"0", "4"}
    assert [len(rows) for rows in plan.decisions["candidates"].values()] == [2, 3]
    for name, rows in plan.decisions["candidates"].items():
        before = find_layers(analyse(program))[name].norms
        assert sorted(rows) == sorted(np.argsort(before)[: len(rows)].tolist())
        a, b = (find_layers(analyse(p))[name].norms for p in (pulled, free))
        ratio = a / b
        others = np.setdiff1d(np.arange(len(before)), rows)
        assert ratio[rows].max() < 0.9 < ratio[others].min()
    assert step.plan.evidence == {"rate": 0.5, "weight": 0.05} and step.training is not None
    assert step.training.kept_epoch == 1 and step.training.held_out_samples == 12


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 2}, "found epochs=2, expected 1: the game is played epoch by epoch"),
        ({"keep": "best"}, "found keep=best, expected last"),
        ({"ema": 0.9}, r"found ema=0.9, expected None"),
        ({"held_out": 0.0}, "found held_out=0, expected held-out samples to judge every epoch by"),
    ],
)
def test_options_that_the_game_has_a_say_in(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        EpochOptions(**options)


# ---------------------------------------------------------------------- a cut


def shrunk(program: Program, layer: str, rows: list[int], factor: float) -> Program:
    copy = program.clone()
    copy.tensors[f"{layer}.weight"].data[rows] *= factor
    return copy


def test_a_cut_removes_small_candidates_exactly() -> None:
    program = shrunk(normalised_net(), "0", [1, 2, 4], 1e-3)
    step, plan, result = run_pass(Cut({"0": (1, 4, 5), "4": (0,)}, {"0": 0.1, "4": 0.0}), program, context())
    assert plan.decisions["rows"] == {"0.weight": [1, 4]}  # not 2, that is small but no candidate
    assert step.verify_error <= TOLERANCE and step.summary == "removed 2 of 4 candidates"
    assert result.layer("0", nn.Conv2d).out_channels == 4
    assert result.layer("4", nn.Conv2d).in_channels == 4


def test_a_cut_that_removes_nothing_is_no_error() -> None:
    program = normalised_net()
    _, plan, result = run_pass(Cut({"0": (1, 4)}, {"0": 0.0}), program, context())
    assert plan.decisions["rows"] == {} and str(result) == str(program)


def test_convolution_groups_lose_equal_numbers() -> None:
    """One group's candidate alone cannot go: the smaller of two blocks would be uneven."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(384, 4),
    )
    program = shrunk(traced(net, 1, *SHAPE), "2", [0, 1, 4], 1e-3)
    _, plan, _ = run_pass(Cut({"2": (0, 1, 4)}, {"2": 0.1}), program, context())
    rows = plan.decisions["rows"]["2.weight"]
    assert len(rows) == 2 and rows[0] in (0, 1) and rows[1] == 4


def test_plans_survive_json() -> None:
    program = normalised_net()
    pass_ = Cut({"0": (1, 4)}, {"0": 1e9})
    plan = pass_.plan(program, context())
    again = Plan.model_validate_json(plan.model_dump_json())
    assert str(pass_.rewrite(program, again)) == str(pass_.rewrite(program, plan))
