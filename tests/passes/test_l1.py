"""l1: filter norms by hand, and two published removals rebuilt to the last parameter."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphcomp.channels import Channels, Removal, analyse
from graphcomp.ir.program import Program
from graphcomp.measure.cost import macs, params_trainable
from graphcomp.models import MODELS
from graphcomp.passes import L1
from graphcomp.pipeline.verify import TOLERANCE, difference, scrambled
from tests.nets import Net
from tests.running import run_pass
from tests.tiny import context, tiny_program, traced


def scores_of(channels: Channels, layer: str) -> list[float]:
    """The score of every output channel of a layer."""
    scores, unjudged = L1(ratio=0.5).score(channels, context())
    assert unjudged == {}
    axis = next(a for a in channels.axes if a.role == "out" and a.layer == layer)
    assert axis.channels.shape == np.unique(axis.channels).shape
    return [float(s) for s in scores[axis.channels]]


def set_weight(layer: nn.Module, values: Tensor) -> None:
    assert isinstance(layer.weight, Tensor)
    with torch.no_grad():
        layer.weight.copy_(values)


def two_convs() -> nn.Sequential:
    """Filters (1, -2), (3, 0), (-0.5, 0.25), (0, 0); bias and normalisation point the other way."""
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    set_weight(net[0], torch.tensor([[1.0, -2.0], [3.0, 0.0], [-0.5, 0.25], [0.0, 0.0]]).view(4, 2, 1, 1))
    with torch.no_grad():
        assert isinstance(net[0].bias, Tensor)
        net[0].bias.copy_(torch.tensor([0.0, 0.0, 50.0, 100.0]))
    set_weight(net[1], torch.tensor([0.1, 0.1, 10.0, 100.0]))
    return net


def test_norms_by_hand() -> None:
    """`sum |W|` over inputs and kernel: neither bias nor normalisation counts, and rows are outputs."""
    assert scores_of(analyse(traced(two_convs(), 1, 2, 4, 4)), "0") == [3.0, 3.0, 0.75, 0.0]


def test_kernel_counts_whole() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 1, 1))
    set_weight(net[0], torch.arange(-27.0, 27.0).view(3, 2, 3, 3))
    expected = [float(sum(range(10, 28))), float(sum(range(1, 10)) + sum(range(9))), float(sum(range(9, 27)))]
    assert scores_of(analyse(traced(net, 1, 2, 5, 5)), "0") == expected


def test_lowest_go_first() -> None:
    program = traced(two_convs(), 1, 2, 4, 4)
    for ratio, gone in ((0.25, [3]), (0.5, [2, 3]), (0.75, [0, 2, 3])):  # equal norms: the first goes
        plan = L1(ratio=ratio, multiple=1).plan(program, context())
        assert plan.decisions["rows"] == {"0.weight": gone}


def test_coupled_layers_add_up() -> None:
    """Channel i of a + b: |a_i| + |b_i|; the order is that of the sum, not of either."""
    net = Net(
        lambda m, x: m.c(m.a(x) + m.b(x)),
        a=nn.Conv2d(1, 3, 1, bias=False),
        b=nn.Conv2d(1, 3, 1, bias=False),
        c=nn.Conv2d(3, 1, 1),
    )
    set_weight(net.a, torch.tensor([1.0, -5.0, 2.0]).view(3, 1, 1, 1))
    set_weight(net.b, torch.tensor([-6.0, 1.0, 2.0]).view(3, 1, 1, 1))
    program = traced(net, 1, 1, 2, 2)
    channels = analyse(program)
    assert scores_of(channels, "a") == scores_of(channels, "b") == [7.0, 6.0, 4.0]
    plan = L1(ratio=0.34, multiple=1).plan(program, context())
    assert plan.decisions["rows"] == {"a.weight": [2], "b.weight": [2]}


def test_transposed_grouped() -> None:
    """A transposed weight is (in, out / groups, k, k): output q * 2 + j reads the inputs of its group q."""
    net = nn.Sequential(nn.ConvTranspose2d(4, 4, 1, groups=2, bias=False), nn.Conv2d(4, 1, 1))
    weight = torch.tensor([[1.0, 10.0], [-2.0, 20.0], [100.0, -3.0], [200.0, 4.0]])  # [in, out of its group]
    set_weight(net[0], weight.view(4, 2, 1, 1))
    assert scores_of(analyse(traced(net, 1, 4, 2, 2)), "0") == [3.0, 30.0, 300.0, 7.0]


def test_grouped_and_linear() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 4, 1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2)
    )
    set_weight(net[0], torch.arange(8.0).view(4, 2, 1, 1))
    set_weight(net[3], -torch.arange(12.0).view(3, 4))
    channels = analyse(traced(net, 1, 4, 2, 2))
    assert scores_of(channels, "0") == [1.0, 5.0, 9.0, 13.0]
    assert scores_of(channels, "3") == [6.0, 22.0, 38.0]


def test_runs_verified() -> None:
    step, _, result = run_pass(L1(ratio=0.5), tiny_program(), context())
    assert step.verify_error <= TOLERANCE
    assert step.after.macs == macs(result) < macs(tiny_program())


# The filter pruning recipes A and B of Li et al. for ResNet-56, rebuilt (METHODS 5.9). Layer ids 2, 4, …, 54
# are the first convolutions of the 27 blocks; of n filters int(n (1 - p)) stay, p by stage.
RECIPES = {
    "A": ((0.1, 0.1, 0.1), {16, 20, 38, 54}, 773_336, 112_435_840),
    "B": ((0.6, 0.3, 0.1), {16, 18, 20, 34, 38, 54}, 735_712, 90_907_264),
}


@pytest.fixture(scope="module")
def resnet56() -> Program:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return traced(MODELS["resnet56"].factory(), 1, 3, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_g5_4_filter_pruning_of_resnet56(resnet56: Program, name: str) -> None:
    fractions, skipped, params, multiplications = RECIPES[name]
    assert (params_trainable(resnet56), macs(resnet56)) == (853_018, 125_485_696)
    channels = analyse(resnet56)
    rows: dict[str, list[int]] = {}
    for block in range(27):
        stage = block // 9
        layer = f"layer{stage + 1}.{block % 9}.conv1"
        norms = torch.tensor(scores_of(channels, layer))
        if 2 * (block + 1) not in skipped:
            gone = len(norms) - int(len(norms) * (1 - fractions[stage]))
            rows[f"{layer}.weight"] = sorted(norms.argsort()[:gone].tolist())
    drop = Removal.from_rows(channels, rows)
    assert drop.rows == rows
    small = drop.apply("fp")
    assert (params_trainable(small), macs(small)) == (params, multiplications)
    if name == "B":  # exact, too
        masked = Removal(analyse(scrambled(resnet56)), drop.gone).mask()
        assert difference(masked, Removal(analyse(masked), drop.gone).apply("fp")) <= TOLERANCE
