"""What a target's kernels make of widths, measured: `graphcomp calibrate-target`.

Three questions, each with numbers: how long one layer takes from width to width (the staircase that
`Target.multiple` stands for), how far predictions are from layers that were not measured, and from whole
networks. Everything that is measured for predictions stays on disk, for later runs of `compile`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from graphcomp.base import Progress
from graphcomp.budget.model import CACHES, LatencyModel, cold_bytes
from graphcomp.budget.stopwatch import Stopwatch
from graphcomp.errors import RecipeError
from graphcomp.ir import Program, trace
from graphcomp.runtime import HOST, Kernel, Target, Timer, measure, race_timer

STAIRS = Kernel("conv", (28, 28), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
WIDTHS = (32, 48, 52, 56, 57, 60, 61, 63, 64, 65, 72, 80, 96)
"""Channels in and out of the layer whose staircase is shown; relative to 64."""


def _conv(plane: int, size: int, stride: int = 1, op: str = "conv") -> Kernel:
    pad = size // 2
    return Kernel(op, (plane, plane), (size, size), (stride, stride), (1, 1), (pad,) * 4)


GRID: tuple[tuple[Kernel, int, int], ...] = (
    (_conv(56, 3), 64, 64),
    (_conv(28, 3), 128, 128),
    (_conv(14, 3), 256, 256),
    (_conv(7, 3), 512, 512),
    (_conv(56, 3, 2), 64, 128),
    (_conv(28, 3, 2), 128, 256),
    (_conv(56, 1), 256, 64),
    (_conv(28, 1), 128, 512),
    (_conv(14, 1), 1024, 256),
    (_conv(7, 1), 512, 2048),
    (_conv(28, 3, op="depthwise"), 192, 192),
    (_conv(14, 3, op="depthwise"), 384, 384),
    (Kernel("linear", ()), 1024, 1000),
)
"""Layers of ResNet, MobileNet and VGG. Predicted from these widths and their halves."""

UNSEEN = ((0.75, 0.75), (1.0, 0.75), (0.75, 0.5))
"""Parts of the widths in and out at which predictions are compared with measurements."""


@dataclass(frozen=True)
class Error:
    """A prediction beside its measurement, in milliseconds."""

    name: str
    predicted: float
    measured: float

    @property
    def relative(self) -> float:
        """Signed: above 0 if too much was predicted."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Calibration:
    """What was measured of a target.

    Attributes:
        stairs: width -> milliseconds of a layer of as many channels in and out.
        layers, networks: predictions of what was not measured before.
    """

    target: str
    threads: int
    stairs: dict[int, float]
    layers: list[Error]
    networks: list[Error]

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the median absolute errors."""
        return {
            **asdict(self),
            "median_layers": median(self.layers),
            "median_networks": median(self.networks),
        }


def median(errors: Sequence[Error]) -> float | None:
    """Of the absolute relative errors; None of none."""
    return float(np.median([abs(e.relative) for e in errors])) if errors else None


def calibrate(
    target: Target,
    threads: int = 1,
    networks: Sequence[str] = (),
    progress: Progress = lambda message, fraction: None,
    timer: Timer | None = None,
) -> Calibration:
    """Measure the staircase of a target, and how well its latencies are predicted.

    Args:
        target, threads: where.
        networks: of torchvision, with random weights, at 1x3x224x224.
        timer: measures ONNX models; the default races them on the target's provider.

    Raises:
        ProviderError: if the target does not work on this machine. RecipeError: no such network, or a target
            for 8 bit files, whose kernels are not those that are timed.
    """
    if target.saturates is not None:
        raise RecipeError(
            f"target: found {target.name}, expected one for float32, whose kernels are timed here; see "
            "docs/onnx.md for the steps of 8 bit kernels"
        )
    programs = {name: _network(name) for name in networks}  # before any work
    progress("staircase", 0.0)
    warm = timer or race_timer(target.provider, threads)
    stairs = {width: measure(STAIRS, width, width, warm) for width in WIDTHS}
    cold = CACHES if target.provider in HOST else 0
    model = LatencyModel(target, threads, timer, cold=cold)
    model.prepare(GRID)
    layers = [
        error
        for index, layer in enumerate(GRID)
        for error in _unseen(model, layer, lambda m, i=index: progress(m, 0.2 + 0.4 * i / len(GRID)))  # type: ignore[misc]
    ]
    found = []
    for index, (name, program) in enumerate(programs.items()):
        progress(name, 0.6 + 0.4 * index / len(programs))
        known = LatencyModel(target, threads, timer, cold=cold_bytes(program, target))
        watch = Stopwatch(program, target, threads, timer)
        found.append(Error(name, known.predict(program), watch.milliseconds()))
    return Calibration(target.name, threads, stairs, layers, found)


def _unseen(model: LatencyModel, layer: tuple[Kernel, int, int], tell: Callable[[str], None]) -> list[Error]:
    """Predictions between the widths that the fit knows."""
    kernel, into, out = layer
    tell(kernel.describe())
    found = []
    for a, b in UNSEEN:
        x, y = int(a * into), int((a if kernel.is_square else b) * out)
        predicted = model.milliseconds(kernel, x, y)
        found.append(Error(f"{kernel.describe()}, {x} -> {y}", predicted, model.measured(kernel, x, y)))
    return found[:1] if kernel.is_square else found


def _network(name: str) -> Program:
    import torchvision

    if name not in torchvision.models.list_models(torchvision.models):
        raise RecipeError(f"--networks: found {name!r}, expected names of torchvision such as resnet18")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torchvision.models.get_model(name, weights=None).eval()
        return trace(module, torch.randn(1, 3, 224, 224), copy_weights=False)


def tables(found: Calibration) -> list[Table]:
    """The staircase, and predictions beside measurements."""
    stairs = Table(title=f"{STAIRS.describe()} on {found.target}, {found.threads} thread(s), n -> n channels")
    for column in ("channels", "ms", "of 64 channels", "by MACs"):
        stairs.add_column(column, justify="right")
    for width, ms in found.stairs.items():
        by_macs = (width / 64) ** 2
        stairs.add_row(str(width), f"{ms:.3f}", f"{ms / found.stairs[64]:.2f}", f"{by_macs:.2f}")
    shown = [stairs]
    for title, errors in (("layers that were not measured", found.layers), ("networks", found.networks)):
        middle = median(errors)
        if middle is None:
            continue
        table = Table(title=f"{title}: median error {middle:.1%}")
        for column in ("what", "predicted ms", "measured ms", "error"):
            table.add_column(column, justify="left" if column == "what" else "right")
        for e in errors:
            table.add_row(Text(e.name), f"{e.predicted:.3f}", f"{e.measured:.3f}", f"{e.relative:+.1%}")
        shown.append(table)
    return shown
