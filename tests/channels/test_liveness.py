"""What still works when whole tensors have lost their channels; `remove` is the oracle for all of it."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.channels import Channels, JoinPolicy, Removal, analyse
from graphcomp.measure.cost import macs
from graphcomp.pipeline.verify import TOLERANCE, difference
from tests.nets import TRAPS
from tests.removing import JOINS, ByRows, exact_program, half_and_whole, random_scores


class Branches(nn.Module):
    """Two layers in a row beside one, concatenated; `f` says how what comes out is read."""

    def __init__(self, f: Any) -> None:
        super().__init__()
        self.f = f
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 5, 1)
        self.c, self.head, self.tail = nn.Conv2d(6, 7, 1), nn.Conv2d(12, 4, 1), nn.Conv2d(5, 4, 1)
        self.norm, self.act = nn.BatchNorm2d(6), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.f(self, x, self.b(self.a(self.act(self.norm(x)))), self.c(x))


def channels_of(f: Any) -> Channels:
    return analyse(exact_program((Branches(f), (1, 3, 5, 5))))


def without(channels: Channels, *layers: str) -> Removal:
    """All that these layers produce."""
    groups = [group for layer in layers for group in channels.group_of(layer)]
    return Removal.of(channels, (c for group in groups for c in group.channels.tolist()))


def concatenated(m: Any, x: Tensor, b: Tensor, c: Tensor) -> Tensor:
    result: Tensor = m.head(torch.cat([b, c], dim=1))
    return result


def test_a_branch_goes_with_whatever_worked_for_it_alone() -> None:
    channels = channels_of(concatenated)
    drop = without(channels, "b").legal(random_scores(channels))
    assert drop.rows == {"a.weight": list(range(6)), "b.weight": list(range(5))}
    idle = drop.idle.names
    assert idle == {"norm", "act", "a", "b"}
    unused = drop.idle.tensors
    assert {name.partition(".")[0] for name in unused} == {"norm", "a", "b"}
    small = drop.apply("test")
    assert not idle & {node.name for node in small.graph.nodes}
    assert not unused & set(small.tensors)
    assert difference(drop.mask(), small) <= TOLERANCE
    assert small.layer("head").in_channels == 7


def test_one_branch_stays() -> None:
    """Without any channel the layer behind the concatenation would have nothing to read."""
    channels = channels_of(concatenated)
    scores = random_scores(channels)
    drop = without(channels, "b", "c").legal(scores)
    rows = drop.rows
    assert (len(rows.get("b.weight", [])), len(rows.get("c.weight", []))) in {(5, 6), (4, 7)}


READ: dict[str, Any] = {
    "by a layer, too": lambda m, x, b, c: m.head(torch.cat([b, c], 1)) + m.tail(b),
    "by the output, too": lambda m, x, b, c: (m.head(torch.cat([b, c], 1)), b),
    "as rows of an image": lambda m, x, b, c: m.head(
        torch.cat([torch.cat([b, c[:, :5]], 2)[:, :, 3:8], c], 1)
    ),
    "by an addition": lambda m, x, b, c: m.head(torch.cat([b, c], 1)) + b.roll(1, 2)[:, :4] * c[:, :4],
    "by a mean over channels": lambda m, x, b, c: m.head(torch.cat([b, c], 1)) * b.mean(1, keepdim=True),
}


@pytest.mark.parametrize("how", READ)
def test_what_somebody_else_reads_stays(how: str) -> None:
    channels = channels_of(READ[how])
    drop = without(channels, "b").legal(random_scores(channels))
    assert len(drop.rows.get("b.weight", [])) < 5
    small = drop.apply("test")
    assert difference(drop.mask(), small) <= TOLERANCE


def test_a_write_that_others_see_stays() -> None:
    """`relu_` in a branch that goes, on what the other branch reads after it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(6, 7, 1)
            self.head = nn.Conv2d(12, 4, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            b = self.b(x.relu_())
            return self.head(torch.cat([b, self.c(x)], 1))

    channels = analyse(exact_program((Net(), (1, 3, 5, 5))))
    drop = without(channels, "b").legal(random_scores(channels))
    assert "b" in drop.idle.names and "relu_" not in drop.idle.names
    small = drop.apply("test")
    assert difference(drop.mask(), small) <= TOLERANCE


def test_a_piece_of_a_split_stays() -> None:
    """A split with a size of 0 is not every runtime's; the layer keeps one channel of the piece."""

    def pieces(m: Any, x: Tensor, b: Tensor, c: Tensor) -> Any:
        first, second = c.split([3, 4], 1)
        return m.head(torch.cat([first, F.relu(second), b], 1))

    channels = channels_of(pieces)
    axis = next(a for a in channels.axes if a.role == "out" and a.layer == "c")
    drop = Removal.of(channels, axis.channels[:3]).legal(random_scores(channels))
    assert int(drop.gone[axis.channels[:3]].sum()) == 2


def test_nothing_is_idle_where_something_of_everything_stays() -> None:
    channels = channels_of(concatenated)
    idle = Removal.of(channels, (c for g in channels.removable for c in g.channels[1:].tolist())).idle
    assert not idle.nodes.any() and not list(idle.missed())
    assert not idle.tensors and not idle.channels.any()


@pytest.mark.slow
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("name", ["densenet-block", "inception-block", "shuffle-units", "unet-skip"])
def test_whole_layers_go_exactly(name: str, join: JoinPolicy) -> None:
    """Oracle: zeros where they are read. Twelve choices each; a plan is replayed on the masked program."""
    program, gone = exact_program(TRAPS[name]()), 0
    channels = analyse(program, join)
    for seed in range(12):
        scores = random_scores(channels, seed)
        drop = half_and_whole(channels, seed).legal(scores)
        assert np.array_equal(drop.legal(scores).gone, drop.gone)
        masked, small = drop.mask(), drop.apply("test")
        assert difference(masked, small) <= TOLERANCE
        assert str(ByRows(join).rewrite(masked, drop.rows)) == str(small)
        gone += int(drop.idle.nodes.sum())
        assert macs(small) < macs(program)
    assert gone > 0
