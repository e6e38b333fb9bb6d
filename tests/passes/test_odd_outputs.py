"""Networks whose outputs are no plain scores: a number a sample, a mask, an index beside them."""

import pytest
import torch
from torch import Tensor, nn

import graphcomp


class Outputs(nn.Module):
    """Scores, one number a sample, which of the inputs count, and the best class."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = self.second(self.first(x).relu()).relu().mean((2, 3))
        scores = self.last(y)
        return scores, scores.mean(1), x > 0, scores.argmax(1)


PASSES = [
    "l1{ratio=0.5}",
    "obs{ratio=0.5}, refit",
    "pfa{energy=0.6, multiple=1}",
    "apoz{ratio=0.5}",
    "dct{rate=2}",
    "low-rank{ratio=0.3}",
    "low-rank{ratio=0.3, fit=responses}",
    "cc{rate=0.3, fit=responses}",
]


@pytest.mark.slow
@pytest.mark.parametrize("passes", PASSES)
def test_every_pass_works(passes: str) -> None:
    program = graphcomp.trace(Outputs(), torch.zeros(1, 3, 12, 12))
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(3, 12, 12, generator=generator) for _ in range(96)]
    small = graphcomp.compile(program, passes, data=data).program
    x = torch.zeros(3, 3, 12, 12)
    for one, other in zip(program(x), small(x), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
