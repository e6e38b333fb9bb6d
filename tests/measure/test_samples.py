"""Sequences with their samples in any axis: what is counted and measured of them is the same."""

import pytest
import torch
from torch import Tensor, nn

import graphcomp
from graphcomp.data import load_data
from graphcomp.ir import Program, trace
from graphcomp.measure import by_sample, grams, macs, output_weights

T, K = 12, 32


class Columns(nn.Module):
    """The columns of an image as a sequence: (n, t, k), (t, n, k), or all rows of a matrix, t before n."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order = order
        self.conv, self.fc, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(K, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        if self.order == "samples":
            return self.last(self.fc(x.permute(0, 3, 1, 2).flatten(2)).relu())  # type: ignore[no-any-return]
        x = x.permute(3, 0, 1, 2).flatten(2)
        if self.order == "time":
            return self.last(self.fc(x).relu())  # type: ignore[no-any-return]
        return self.last(self.fc(x.reshape(-1, K)).relu())  # type: ignore[no-any-return]


def program(order: str) -> Program:
    return trace(Columns(order), torch.zeros(1, 1, 4, T))


DATA = load_data("random", input_shape=(1, 4, T), seed=0).train


@pytest.mark.parametrize("order", ["time", "matrix"])
def test_what_is_measured_is_the_same(order: str) -> None:
    plain, other = program("samples"), program(order)
    assert macs(other) == macs(plain)
    a, b = (grams(p, DATA, ["fc", "last"], positions=64, seed=0, memory=1 << 30) for p in (plain, other))
    for name, gram in a.items():
        assert b[name].rows == gram.rows == len(DATA) * T
        torch.testing.assert_close(b[name].matrix, gram.matrix, rtol=1e-5, atol=1e-5)
    few = grams(other, DATA, ["fc"], positions=3, seed=0, memory=1 << 30)["fc"]
    assert few.rows == 3 * len(DATA)
    weights = [output_weights(p, DATA, ["fc"], seed=0, memory=1 << 30)["fc"] for p in (plain, other)]
    assert torch.corrcoef(torch.stack(weights))[0, 1] > 0.9


def test_outputs_are_taken_apart_where_samples_can_be() -> None:
    x = torch.randn(3, 1, 4, T)
    rows = by_sample(program("samples"), program("samples")(x), 3)
    torch.testing.assert_close(by_sample(program("time"), program("time")(x), 3), rows)
    torch.testing.assert_close(
        by_sample(program("matrix"), program("matrix")(x), 3), program("time")(x).reshape(1, -1)
    )


@pytest.mark.parametrize("order", ["time", "matrix"])
@pytest.mark.parametrize(
    "passes",
    [
        "obs{ratio=0.5, multiple=1}, refit",
        "obs{target=macs:0.6, multiple=1}",
        "low-rank{energy=0.5, fit=responses}",
    ],
)
def test_passes_that_measure_take_them(order: str, passes: str) -> None:
    data = load_data("random", input_shape=(1, 4, T), seed=0)
    found = program(order)
    assert macs(graphcomp.compile(found, passes, data=data).program) < macs(found)
