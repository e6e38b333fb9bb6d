"""What networks keep beside what they return: never of another call than the one that is traced."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from graphcomp.errors import TraceError
from graphcomp.ir.tracing import trace

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def block(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())


class Taps(nn.Module):
    """Takes features out of its backbone by a hook, as extractors of features do."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3), block(8))
        self.head = nn.Conv2d(8, 2, 1)
        self.seen: dict[str, Tensor] = {}
        self.body.get_submodule(at).register_forward_hook(lambda m, x, y: self.seen.update(y=y))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return cast(Tensor, self.head(y + self.seen["y"]))


@pytest.mark.parametrize("share", [False, True])
def test_what_hooks_keep_is_of_the_same_call(share: bool) -> None:
    """A copy's hooks write into the original, and its forward would read what an earlier call left there."""
    model = Taps("0").eval()
    model(X + 1)
    held = model.seen["y"].clone()
    program = trace(model, X, copy_weights=not share)
    assert torch.equal(model.seen["y"], held)
    assert torch.equal(program(X), model(X))
    torch.testing.assert_close(program(X[:1]), model(X)[:1])
    with torch.no_grad():
        model.head.weight.zero_()
    assert share == torch.equal(program(X), model(X))


def test_what_hooks_of_layers_keep_is_not_taken_from_an_earlier_call() -> None:
    model = Taps("1.2").eval()
    model(X + 1)
    with pytest.raises(TraceError, match=r"Taps: found another result .*body\.1\.2 has hooks, and what they"):
        trace(model, X)


def test_tensors_that_modules_remember_are_not_constants() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = block(3), torch.zeros(1, 8, 8, 8)

        def forward(self, x: Tensor) -> Tensor:
            last, self.last = self.last, self.layer(x)
            return self.last - last

    model = Remembers().eval()
    with pytest.raises(TraceError, match="last: found a value that Remembers keeps from one"):
        model(X[:1])
        trace(model, X)


class Grid(nn.Module):
    """Makes its grid anew only for another size than that of its last call, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = block(3)
        self.shape: torch.Size | None = None
        self.grid = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.shape != x.shape:
            self.shape = x.shape
            self.grid = torch.arange(x.shape[3], dtype=x.dtype).expand(x.shape[2], -1)
        return x * self.grid


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_sizes_of_an_earlier_call_decide_nothing(batch: int) -> None:
    """Whatever it was called with, batches of all sizes are followed, and it keeps what it kept."""
    model = Grid().eval()
    model(X[:1].expand(batch, -1, -1, -1))
    grid = model.grid
    program = trace(model, X)
    assert model.shape == (batch, 8, 8, 8) and model.grid is grid
    for n in (1, 2, 3, 5):
        x = X[:1].expand(n, -1, -1, -1) + n
        torch.testing.assert_close(program(x), model(x))
    larger = torch.randn(2, 3, 12, 10)
    torch.testing.assert_close(program(larger), model(larger))
