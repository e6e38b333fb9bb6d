"""What networks make of sizes alone is held, and channels are followed through it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcomp.channels import analyse
from graphcomp.ir import op_name, trace
from graphcomp.pipeline.verify import verify_pass
from tests.nets import scramble
from tests.removing import ByRows, half, random_scores


class Net(nn.Module):
    """A layer, something that is made of sizes, and a layer that reads it."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], out: int = 8) -> None:
        super().__init__()
        self.function = function
        self.a, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(out, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, x))


def _grown(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros(x.size(0), 8, x.size(2), x.size(3), dtype=x.dtype)
    for _ in range(2):
        state = torch.tanh(m.a(x) + state) * 0.5 + state
    return state


def _written(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    out = torch.ones(x.shape[0], y.shape[1], y.shape[2], y.shape[3], dtype=x.dtype)
    out += y
    out.mul_(y)
    return out


def _placed(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    out = y.new_zeros((y.size(0), 2 * y.size(1), y.size(2), y.size(3)))
    out[:, :8], out[:, 8:] = y, y.sigmoid()
    return out


def _identity(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return torch.einsum("bchw,cd->bdhw", y, torch.eye(8, dtype=x.dtype, device=x.device))


WAYS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "a state of zeros": (_grown, 8),
    "ones that are written into": (_written, 8),
    "written part by part": (_placed, 16),
    "concatenated": (lambda m, x: torch.cat([m.a(x), torch.full((x.size(0), 4, *x.shape[2:]), 0.5)], 1), 12),
    "empty": (lambda m, x: torch.cat([m.a(x)[:, :, :0], m.a(x).sin()], 2), 8),
    "ones of a number of channels": (lambda m, x: m.a(x) + torch.ones(1, m.a(x).size(1), 1, 1), 8),
    "ones by the size of a weight": (lambda m, x: m.a(x) * x.new_ones(m.a.weight.shape[0], 1, 1), 8),
    "numbered": (lambda m, x: m.a(x) * torch.linspace(0, 1, 8, dtype=x.dtype)[:, None, None], 8),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_made_of_sizes_goes_with_the_channels(way: str) -> None:
    function, out = WAYS[way]
    model = scramble(Net(function, out), 0).double().eval()
    program = trace(model, torch.zeros(1, 3, 6, 5, dtype=torch.float64))
    for batch, height in ((1, 6), (3, 9)):
        x = torch.randn(batch, 3, height, 5, dtype=torch.float64)
        torch.testing.assert_close(program(x), model(x))
        torch.testing.assert_close(program(x), model(x))  # nothing was written into what is held
    channels = analyse(program)
    removal, kept = half(channels).feasible(random_scores(channels))
    assert not kept
    assert len(removal.rows["a.weight"]) == 4
    verify_pass(ByRows(), program, removal.rows)
    x = torch.randn(3, 3, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(removal.apply("test")(x), removal.mask()(x), rtol=0, atol=1e-12)


def test_sizes_of_parameters_are_numbers() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 6, 1), nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).view(x.size(0), self.table.shape[0], -1).mean(2)
            return y @ self.table / self.table.size(1) / self.table.dim()

    program = trace(Sized().eval(), torch.zeros(1, 3, 4, 4))
    assert not {op_name(program, n) for n in program.graph.nodes} & {"getattr", "dim"}
    assert len(analyse(program).removable) == 1


def test_what_follows_the_inputs_stays_a_computation() -> None:
    program = trace(Net(lambda m, x: m.a(x) + torch.arange(x.size(3)) / 9).eval(), torch.zeros(1, 3, 6, 5))
    assert "arange" in {op_name(program, n) for n in program.graph.nodes}
    assert program(torch.zeros(2, 3, 4, 8)).shape == (2, 2, 4, 8)


def test_an_empty_operand_of_another_type_stays() -> None:
    def widened(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.a(x)[:, :, :0].double(), m.a(x)[:, :, :0].long(), m.a(x)], 2).float()

    program = trace(
        Net(lambda m, x: torch.cat([m.a(x)[..., :0], m.a(x)], -1)).eval(), torch.zeros(1, 3, 6, 5)
    )
    assert [len(n.args[0]) for n in program.graph.nodes if op_name(program, n) == "cat"] == [1]
    program = trace(Net(widened).eval(), torch.zeros(1, 3, 6, 5))
    assert [len(n.args[0]) for n in program.graph.nodes if op_name(program, n) == "cat"] == [3]
