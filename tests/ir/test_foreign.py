"""Functions of the user's own (torch.fx.wrap): of what they do beside returning something nobody knows."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphcomp
from graphcomp.errors import TraceError
from graphcomp.ir import eliminate_dead_nodes, fresh_inputs, masked_spread

_CALLS = [0]


def _add_into(x: Tensor, y: Tensor) -> Tensor:
    return x.add_(y)


def _window(shift: list[int], size: list[int], window: list[int]) -> tuple[list[int], list[int]]:
    for i, n in enumerate(size):
        if n <= window[i]:
            window[i], shift[i] = n, 0
    return window, shift


def _scaled(size: int, x: Tensor) -> Tensor:
    return x * size


def _counting(x: Tensor) -> Tensor:
    _CALLS[0] += 1
    return x * _CALLS[0]


fx.wrap("_add_into")
fx.wrap("_window")
fx.wrap("_counting")
fx.wrap("_scaled")


class Writing(nn.Module):
    """Its call has a result that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(y)
        _add_into(z, y)
        return self.c(z)


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.window, self.shift = [4, 16], [2, 8]

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        _, _, h, w = y.shape
        window, shift = _window(self.shift.copy(), [h, w], self.window.copy())
        if shift[0]:
            y = torch.roll(y, (-shift[0], -shift[1]), (2, 3))
        y = y.view(y.shape[0], 8, h // window[0], window[0], w // window[1], window[1])
        return y.amax((3, 5))


class Filled(nn.Module):
    """As a detector's anchors: a constant tensor says what fills another one; and results have names."""

    strides: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("strides", torch.tensor([8.0, 16.0]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2)
        full = y.new_full((y.shape[2], 1), self.strides[1]) + torch.full((1,), self.strides[0])
        best = torch.topk(y, 3, dim=2)
        n = 2 if best.values.shape[2] == 3 else 1
        return (
            (y * full.flatten()).sum(2) + n * best.values.sum(2) + torch.full_like(y, self.strides[0]).sum(2)
        )


@pytest.mark.parametrize("build", [Writing, Windows, Filled])
def test_programs_compute_what_the_network_does(build: type[nn.Module], tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = build().eval()
    program = graphcomp.trace(model, torch.randn(1, 3, 12, 16))
    for batch in (1, 3):
        (x,) = fresh_inputs(program, batch, seed=batch)
        torch.testing.assert_close(program(x), model(x.clone()))
    if build is Filled:  # the others call functions of the user's own, which no file may name
        graphcomp.save(program, tmp_path / "p")
        graphcomp.load(tmp_path / "p")


def test_a_write_by_an_unread_call_survives_passes() -> None:
    torch.manual_seed(0)
    model = Writing().eval()
    program = graphcomp.trace(model, torch.randn(1, 3, 8, 8))
    assert any(n.target is _add_into for n in program.graph.nodes)
    small = graphcomp.compile(program, "l1{ratio=0.5, multiple=1}", allow_nothing=True).program
    (x,) = fresh_inputs(program, 2, seed=1)
    torch.testing.assert_close(small(x), model(x.clone()))  # what the function touches is left alone


def test_sizes_are_specialised_where_they_decide() -> None:
    assert graphcomp.trace(Windows(), torch.randn(1, 3, 12, 16)).interface.specialised


def test_what_a_trace_cannot_show_is_refused() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return _counting(x)

    with pytest.raises(TraceError, match=r"found another result than the network's .* torch\.fx\.wrap"):
        graphcomp.trace(Net(), torch.randn(1, 3))


def test_a_size_beside_a_tensor_decides_nothing() -> None:
    """The call is recorded with the size as it is: the network is for all of them."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return _scaled(x.shape[2], x)

    program = graphcomp.trace(Net(), torch.randn(1, 3, 4, 4))
    assert not program.interface.specialised
    x = torch.randn(2, 3, 7, 5)
    torch.testing.assert_close(program(x), Net()(x))


def test_a_network_for_one_batch_is_compared_at_that_one() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return _scaled(2, x.view(1, 12))

    program = graphcomp.trace(Net(), torch.randn(1, 3, 4))
    x = torch.randn(1, 3, 4)
    torch.testing.assert_close(program(x), Net()(x))


def test_masks_that_nothing_reads_are_no_calls_of_the_users() -> None:
    """A removal's own functions are pure."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(masked_spread, (x, x, [1], 0))
    graph.output(x)
    eliminate_dead_nodes(graph, nn.Module())
    assert [n.op for n in graph.nodes] == ["placeholder", "output"]


def test_what_a_network_remembers_is_not_a_trace() -> None:
    """With shared weights, too: what it computed while it was traced is no tensor."""

    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.grid, self.size = nn.Conv2d(3, 4, 1), torch.zeros(0), (0, 0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            if self.size != (y.shape[2], y.shape[3]):
                self.grid, self.size = torch.ones_like(y[:1, :1]) * 2, (y.shape[2], y.shape[3])
            return y * self.grid

    model, x = Remembering().eval(), torch.randn(2, 3, 4, 4)
    program = graphcomp.trace(model, x[:1], copy_weights=False)
    assert type(model.grid) is Tensor and model.size == (0, 0)
    torch.testing.assert_close(model(x), program(x))
