"""What no weights may hold, and what masks and bounds may."""

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from graphcomp.ir import damaged, named_tensors

INF, NAN = float("inf"), float("nan")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), FrozenBatchNorm2d(2))
        self.inner.register_buffer("mask", torch.zeros(4))
        self.register_buffer("bound", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    ("name", "value", "count"),
    [
        ("bound", INF, 0),
        ("bound", NAN, 1),
        ("inner.mask", -INF, 0),
        ("inner.mask", NAN, 4),
        ("scale", INF, 1),
        ("inner.0.weight", -INF, 2),
        ("inner.1.weight", NAN, 2),
        ("inner.1.running_mean", INF, 2),
        ("inner.1.running_var", INF, 2),
        ("inner.2.weight", INF, 2),
        ("inner.2.running_var", NAN, 2),
    ],
)
def test_infinities_are_numbers_where_nothing_is_learned_or_estimated(
    name: str, value: float, count: int
) -> None:
    net = Net()
    tensors = named_tensors(net)
    assert damaged(net, tensors) == {}
    tensors[name].data.fill_(value)
    assert damaged(net, tensors) == ({name: count} if count else {})
