"""One pass over the data: what watchers see, and exact counts of zeros."""

import pytest
import torch
from torch import Tensor, fx, nn

from graphcomp.calibrate import ZeroCounter, watch
from graphcomp.errors import DataError
from graphcomp.program import Program
from tests.nets import Net
from tests.tiny import seeded, traced

__all__ = ["seeded"]


def node(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.nodes if n.name == name)


def test_watches_every_batch_of_the_nodes_asked_for() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    program = traced(net, 1, 3, 4, 4)
    batches = [torch.randn(n, 3, 4, 4) for n in (3, 1, 2)]
    seen: dict[str, list[Tensor]] = {"conv": [], "relu": []}
    watchers = {node(program, "_0"): seen["conv"].append, node(program, "_1"): seen["relu"].append}
    assert watch(program, iter(batches), watchers) == 6
    with torch.no_grad():
        for x, conv, relu in zip(batches, seen["conv"], seen["relu"], strict=True):
            assert torch.equal(conv, net[0](x))
            assert torch.equal(relu, net[0](x).relu())
    assert not seen["relu"][0].requires_grad


def test_sees_a_value_before_it_is_changed_in_place() -> None:
    net = Net(lambda m, x: torch.relu_(m.conv(x)), conv=nn.Conv2d(1, 2, 1))
    program = traced(net, 1, 1, 3, 3)
    lowest: list[float] = []
    watch(
        program, [torch.randn(8, 1, 3, 3)], {node(program, "conv"): lambda t: lowest.append(float(t.min()))}
    )
    assert lowest[0] < 0


def test_runs_in_eval_mode() -> None:
    net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3))
    program = traced(net, 1, 3, 2, 2)
    program.module.train()
    seen: list[Tensor] = []
    x = torch.randn(4, 3, 2, 2)
    watch(program, [x], {node(program, "_0"): seen.append})
    assert torch.equal(seen[0], x)
    assert not program.tensors["1.running_mean"].any()


def test_no_samples() -> None:
    program = traced(nn.ReLU(), 1, 3)
    with pytest.raises(DataError, match="calibration: found no samples, expected at least one; give --data"):
        watch(program, [], {})


def test_counts_exact_zeros_by_channel() -> None:
    counter = ZeroCounter(3)
    x = torch.tensor([[[0.0, 1.0], [0.0, 0.0], [-1.0, 2.0]], [[-0.0, 0.0], [3.0, 1e-30], [1.0, 1.0]]])
    counter(x)  # [batch, channel, position]
    assert counter.zeros.tolist() == [3, 2, 0]
    assert counter.fraction.tolist() == [3 / 4, 2 / 4, 0.0]
    counter(torch.ones(1, 3, 4))
    assert counter.fraction.tolist() == [3 / 8, 2 / 8, 0.0]


def test_counts_along_the_last_dimension() -> None:
    counter = ZeroCounter(2, dim=-1)
    counter(torch.tensor([[[0.0, 1.0], [0.0, 2.0], [0.0, 0.0]]]))  # [batch, token, channel]
    assert counter.zeros.tolist() == [3, 1] and counter.entries == 3


def test_batches_do_not_matter() -> None:
    x = torch.randn(100, 5, 3, 3).relu()
    results = []
    for size in (1, 7, 64, 100):
        counter = ZeroCounter(5)
        for part in x.split(size):
            counter(part)
        results.append(counter.fraction.tolist())
    assert all(r == results[0] for r in results)
    assert results[0] == ((x == 0).double().mean((0, 2, 3))).tolist()


def test_nothing_counted_is_zero() -> None:
    assert ZeroCounter(2).fraction.tolist() == [0.0, 0.0]
