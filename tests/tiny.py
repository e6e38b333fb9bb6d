"""One small network with a residual addition, and what the pipeline's tests run it with.

The command line loads it too: `tests/tiny.py:tiny`, with 3x8x8 images.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from graphcomp.data.sources import load_data
from graphcomp.data.split import Data
from graphcomp.ir.program import Program
from graphcomp.ir.tracing import trace
from graphcomp.pipeline import Context
from graphcomp.runtime.targets import TARGETS

SPEC = f"{Path(__file__)}:tiny"
SHAPE = (1, 3, 8, 8)


class Tiny(nn.Module):
    """stem -> (inner -> outer) + identity -> linear; every layer 16 wide but the 4 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.outer, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x)).relu()
        x = (x + self.bn2(self.outer(self.bn1(self.inner(x)).relu()))).relu()
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def images_in(folder: Path, count: int) -> str:
    """A file of labelled images for it, as `--data` names it."""
    rng, file = np.random.default_rng(0), folder / "d.npz"
    x = rng.integers(0, 256, (count, *SHAPE[2:], SHAPE[1]), dtype=np.uint8)
    np.savez(file, x=x, y=rng.integers(0, 4, count))
    return f"npz:{file}"


def tiny() -> nn.Module:
    """The same weights and statistics every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Tiny()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def traced(module: nn.Module, *shape: int) -> Program:
    """A Program of `module` in eval mode, for a random input."""
    return trace(module.eval(), torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def tiny_program() -> Program:
    return traced(tiny(), *SHAPE)


def random_data(*shape: int, samples: int = 64) -> Data:
    """Unlabelled normal samples of `shape` (without the batch)."""
    return load_data(f"random?limit={samples}", input_shape=shape, seed=0)


def context(data: Data | None = None, target: str = "cpu-avx2", seed: int = 0) -> Context:
    return Context(TARGETS[target], data, seed)
