"""A network whose layers are stored as DCT coefficients, without a search for the best order."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from graphcomp.ir.coefficients import compressed
from graphcomp.ir.program import Program, assemble, parts
from graphcomp.ir.tracing import trace
from tests.nets import scramble


class Net(nn.Module):
    """What a DCT layer meets: normalisation behind it, groups, padding modes, two calls, tokens, a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 48, 3, stride=2, padding=1, padding_mode="reflect", bias=False)
        self.bn = nn.BatchNorm2d(48)
        self.twice = nn.Conv2d(48, 48, (5, 3), groups=4, padding="same")
        self.tokens = nn.Linear(48, 48)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(torch.relu(self.stem(x)))))
        x = self.twice(torch.relu(self.twice(x)))
        x = self.tokens(x.flatten(2).transpose(1, 2)).mean(1)
        return cast(Tensor, self.fc(x))


LAYERS = ("conv", "twice", "tokens", "fc")


def with_dct(program: Program, names: Sequence[str], rows: int = 4, rate: int = 8) -> Program:
    """The named layers as `rows` rows of coefficients, the 1/rate lowest, in a random order."""
    root, graph = parts(program)
    generator = torch.Generator().manual_seed(0)
    for name in names:
        plain = program.modules[name]
        assert isinstance(plain, nn.Conv2d | nn.Linear)
        columns = plain.weight.numel() // rows
        order = torch.randperm(columns, generator=generator)
        root.set_submodule(name, compressed(plain, rows, columns // rate, order))
    return Program(assemble(program, root, graph), program.example_inputs, program.history)


def dct_program() -> Program:
    """`Net` for 12x12 images with all of LAYERS as coefficients."""
    torch.manual_seed(0)
    return with_dct(trace(scramble(Net(), 0).eval(), torch.randn(1, 3, 12, 12)), LAYERS)
